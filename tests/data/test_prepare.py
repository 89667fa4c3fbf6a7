"""Text to token files: the same tokens however they came about, in memory that does not grow."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.__main__ import main
from minigpt2.data import documents, prepare, sources
from minigpt2.data.batches import Batches, open_corpus, open_tokens
from minigpt2.data.documents import DataError, TextOptions
from minigpt2.data.sources import Piece, read_list, survey
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer


def encode(text: str) -> list[int]:
    return get_tokenizer().encode_ordinary(text)


def read_pieces(path: Path | None, separator: str | None = None, file: int = 0, offset: int = 0) -> Iterator[Piece]:
    """The pieces of all that is text under `path`."""
    text = TextOptions(separator=separator, allow_left_out=True)
    with tempfile.TemporaryDirectory() as folder:
        survey(path, text, Path(folder, "list"))
        found = list(read_list(Path(folder, "list")))
    yield from sources.read_pieces(sources.root_of(path), found, text, file, offset)


def read_documents(path: Path | None, separator: str | None = None) -> Iterator[str]:
    """The documents under `path`, each of them one string."""
    text = ""
    for piece in read_pieces(path, separator):
        text += piece.text
        if piece.ends:
            yield text
            text = ""


def texts_of(tokens: np.ndarray) -> list[str]:
    """The documents of a split, each of which must end with <|endoftext|>."""
    *found, rest = np.split(tokens, np.flatnonzero(tokens == END_OF_TEXT) + 1)
    assert not len(rest)
    return [get_tokenizer().decode(document[:-1].tolist()) for document in found]


def split(path: Path, out: Path, validation_fraction: float = 0.05) -> tuple[list[str], list[str]]:
    """The documents under `path` that go to training and to validation."""
    prepare.prepare(path, out, validation_fraction=validation_fraction, progress=False)
    train, validation = map(texts_of, open_corpus(None, out))
    return train, validation


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """60 documents in three folders."""
    folder = tmp_path / "corpus"
    for i in range(60):
        path = folder / "abc"[i % 3] / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Document {i}, of {i * 7} words: " + " ".join(str(j * i) for j in range(i * 7)))
    return folder


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "train.bin").read_bytes(), (folder / "val.bin").read_bytes()


def test_splits_hold_whole_documents_each_once(corpus: Path, tmp_path: Path) -> None:
    meta = prepare.prepare(corpus, tmp_path / "out", validation_fraction=0.2, progress=False)
    splits = open_corpus(None, tmp_path / "out")
    assert all(isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 for tokens in splits)
    n_train, n_validation = map(len, splits)
    assert (meta["documents"], meta["train_tokens"], meta["validation_tokens"]) == (60, n_train, n_validation)
    assert 0.15 < n_validation / (n_train + n_validation) < 0.25
    texts = list(read_documents(corpus))
    train, validation = map(texts_of, splits)
    assert sorted(train + validation) == sorted(texts)
    assert all(part == [text for text in texts if text in part] for part in (train, validation))
    assert sorted([*splits.train, *splits.validation]) == sorted(id for t in texts for id in [*encode(t), END_OF_TEXT])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "files.jsonl",
        "tokens.json",
        "train.bin",
        "val.bin",
    ]


def test_the_split_depends_on_the_texts_and_not_on_their_names(corpus: Path, tmp_path: Path) -> None:
    before = set(split(corpus, tmp_path / "before")[1])
    for i, path in enumerate(sorted(corpus.rglob("*.txt"), reverse=True)):
        path.rename(corpus / f"renamed-{i:02}.txt")
    assert set(split(corpus, tmp_path / "after")[1]) == before != set()


@pytest.mark.parametrize("n", [2, 3, 4, 12, 21, 30])
def test_a_few_documents_of_one_size_give_about_the_fraction(tmp_path: Path, n: int) -> None:
    """The end of one of them, where each is longer than that; and nothing is lost."""
    text = tmp_path / "text"
    text.mkdir()
    books = [" ".join(f"{number * 1000 + word}" for word in range(400)) for number in range(n)]
    for number, book in enumerate(books):
        (text / f"{number:02}").write_text(book)
    train, validation = split(text, tmp_path / "out")
    n_train, n_validation = (len(tokens) for tokens in open_corpus(None, tmp_path / "out"))
    assert 0.03 < n_validation / (n_train + n_validation) < 0.07
    assert sorted("".join(train + validation)) == sorted("".join(books))
    assert all(any(part in book for book in books) for part in train + validation)


def test_short_documents_go_first_and_the_longest_gives_the_rest(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    long, short = "A long story. " * 500, "A short story."
    (text / "long").write_text(long)
    (text / "short").write_text(short)
    (first,), (rest, whole) = split(text, tmp_path / "out")
    assert (first + rest, whole) == (long, short)


def test_one_document_gives_its_end(tmp_path: Path) -> None:
    """And text becomes token files where it is first opened, and is left alone from then on."""
    path, out = tmp_path / "one.txt", tmp_path / "out"
    path.write_text("A long story. " * 200)
    ids = [*encode(path.read_text()), END_OF_TEXT]
    train, validation = open_corpus(path, out)
    assert [*train, *validation] == ids
    assert len(validation) == len(ids) // 20
    path.unlink()
    for again in (open_corpus(path, out), open_corpus(out, tmp_path / "unused")):
        assert [*again.train, *again.validation] == ids


def test_two_tiny_documents_leave_validation_empty(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a").write_text("a")
    (text / "b").write_text("b")
    assert split(text, tmp_path / "out") == (["a", "b"], [])


def test_end_of_text_written_in_a_document_is_text(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("before <|endoftext|> after")
    assert split(path, tmp_path / "out", validation_fraction=0.0) == (["before <|endoftext|> after"], [])


def test_a_folder_is_read_in_the_order_of_paths_without_what_is_not_text(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "corpus"  # what is above it may be hidden
    for name, text in {"b.txt": "second", "c/d.md": "thïrd", "a.txt": "first", ".no": "no", ".git/no": "no"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "binary.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "upwards").symlink_to(folder)
    assert list(read_documents(folder)) == ["first", "second", "thïrd"]


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin1\.txt: not UTF-8 text: .*position 2"):
        list(read_documents(path))


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: no such file or folder"):
        prepare.prepare(tmp_path / "nothing", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [None, b"", b"\xff"])
def test_a_folder_without_text_is_named(tmp_path: Path, data: bytes | None) -> None:
    text = tmp_path / "text"
    text.mkdir()
    if data is not None:
        (text / "file").write_bytes(data)
    with pytest.raises(DataError, match=f"{text}: no text found; "):
        prepare.prepare(text, tmp_path / "out", progress=False)


def test_the_standard_library_is_there_without_its_tests() -> None:
    names = [name for name, _ in sources.standard_library()]
    assert len(names) > 300
    assert Path(dataclasses.__file__).name in names
    assert not any({"test", "site-packages"} & set(name.split("/")[-3:]) for name in names)
    assert next(read_documents(None)) == (sources.root_of(None) / names[0]).read_text(encoding="utf-8")


@pytest.mark.slow
def test_processes_change_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare.prepare(corpus, tmp_path / "a", progress=False)
    started = []
    pool = prepare.ProcessPoolExecutor
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", lambda *args: started.append(args[0]) or pool(*args))
    monkeypatch.setattr(prepare, "SMALL", 0)
    prepare.prepare(corpus, tmp_path / "b", workers=2, progress=False)
    assert started == [2]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


TEXTS = st.text(st.sampled_from("ab'st 1.\n\t\r 　é漢😀" + "\x1c\x85"), min_size=1, max_size=60)
TEXTS |= st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1, max_size=40)


@given(text=TEXTS, size=st.integers(1, 12), separator=st.sampled_from([None, "b", " 1", "\n\n"]))
@settings(max_examples=150, deadline=None)
def test_pieces_make_up_the_text(tmp_path_factory, text: str, size: int, separator: str | None) -> None:
    """Whatever their size, and wherever reading starts again."""
    path = tmp_path_factory.mktemp("text") / "text"
    text = text.encode("utf-8", "ignore").decode()
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        pieces = list(read_pieces(path, separator))
        found = list(read_documents(path, separator))
        for i, piece in enumerate(pieces):
            assert list(read_pieces(path, separator, piece.file, piece.offset)) == pieces[i + 1 :]
    expected = text.split(separator) if separator else [text]
    assert [part for part in found if part] == [part for part in expected if part]
    assert all(len(piece.text) <= size for piece in pieces)


@given(
    words=st.lists(st.text(st.sampled_from("abs'1.é漢\t"), max_size=4), min_size=2, max_size=40),
    size=st.integers(30, 50),
)
@settings(max_examples=150, deadline=None)
def test_the_tokens_of_the_pieces_are_those_of_the_text(tmp_path_factory, words: list[str], size: int) -> None:
    text = " a\nb ".join(words)
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        pieces = [piece.text for piece in read_pieces(path)]
    assert [token for piece in pieces for token in encode(piece)] == encode(text)


def test_an_interrupted_run_continues(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted again and again, and each time with writes that the journal knows nothing of."""
    monkeypatch.setattr(prepare, "JOURNAL_EVERY", 500)
    monkeypatch.setattr(documents, "PIECE", 300)
    prepare.prepare(corpus, tmp_path / "whole", progress=False)
    append, calls, attempts = prepare._append, 0, 0

    def failing(*args) -> None:
        nonlocal calls
        calls += 1
        append(*args)
        if calls % 40 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_append", failing)
    while not (tmp_path / "broken" / "tokens.json").exists():
        attempts += 1
        with contextlib.suppress(KeyboardInterrupt):
            prepare.prepare(corpus, tmp_path / "broken", workers=2, progress=False)
    assert attempts > 3
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_changed_files_start_it_over(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(prepare, "JOURNAL_EVERY", 500)
    append = prepare._append

    def failing(journal, *args) -> None:
        append(journal, *args)
        if journal.documents == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_append", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(corpus, tmp_path / "out", progress=False)
    monkeypatch.setattr(prepare, "_append", append)
    (corpus / "a" / "00.txt").write_text("Another text.")
    prepare.prepare(corpus, tmp_path / "out", progress=False)
    assert "have changed" in capsys.readouterr().out
    prepare.prepare(corpus, tmp_path / "fresh", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def interrupted_at(instant: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """prepare.prepare(*arguments), interrupted when it calls a function of its module."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare, instant, mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(*arguments, progress=False)


@pytest.mark.parametrize("instant", ["_tokenise", "split"])
def test_renew_takes_nothing_from_an_interrupted_one_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: str
) -> None:
    (tmp_path / "text").write_bytes("caf\xe9 au lait, ".encode("latin-1") * 50)

    interrupted_at(instant, monkeypatch, tmp_path / "text", tmp_path / "out", TextOptions(encoding="cp437"))
    settings = {"text": TextOptions(encoding="latin-1"), "progress": False}
    if instant == "split":
        with pytest.raises(DataError, match=r"was begun for .*cp437"):
            prepare.prepare(tmp_path / "text", tmp_path / "out", **settings)
    prepare.prepare(tmp_path / "text", tmp_path / "out", renew=True, **settings)
    prepare.prepare(tmp_path / "text", tmp_path / "fresh", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_an_old_journal_does_not_count_new_files(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """Interrupted with its work almost done, and again just when it starts over for changed files."""
    for instant in ("split", "_tokenise"):
        interrupted_at(instant, monkeypatch, corpus, tmp_path / "out")
        (corpus / "a" / "00.txt").write_text("Another text.")
    prepare.prepare(corpus, tmp_path / "out", progress=False)
    prepare.prepare(corpus, tmp_path / "fresh", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_larger_corpus_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 1 << 14)
    monkeypatch.setattr(prepare, "JOURNAL_EVERY", 1 << 14)
    get_tokenizer()
    peaks = []
    for n in (1, 8):
        text = tmp_path / f"{n}.txt"
        with text.open("w") as file:
            for i in range(n * 10_000):
                file.write(f"The number {i} comes after {i - 1}.\n")
        tracemalloc.start()
        prepare.prepare(text, tmp_path / f"out{n}", workers=1, progress=False)
        next(Batches(open_corpus(None, tmp_path / f"out{n}").train, 8, 32, seed=0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1.2 * peaks[0] + 100_000
    assert (tmp_path / "8.txt").stat().st_size > 2 * max(peaks)


def test_separator(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\nThree.")
    arguments = {"validation_fraction": 0.0, "progress": False}
    meta = prepare.prepare(
        tmp_path / "stories.txt", tmp_path / "out", text=TextOptions("\n<|endoftext|>\n"), **arguments
    )
    assert meta["documents"] == 3
    expected = [token for text in ("One.", "Two.", "Three.") for token in [*encode(text), END_OF_TEXT]]
    assert open_tokens(tmp_path / "out" / "train.bin").tolist() == expected
    meta = prepare.prepare(tmp_path / "stories.txt", tmp_path / "one", **arguments)
    assert meta["documents"] == 1


def test_a_folder_is_not_used_for_two_things(corpus: Path, tmp_path: Path) -> None:
    first = prepare.prepare(corpus, tmp_path / "out", progress=False)
    assert prepare.prepare(corpus, tmp_path / "out", progress=False) == first
    with pytest.raises(
        DataError, match=r"validation_fraction 0\.5 instead of 0\.05; --renew replaces them, another --out keeps them"
    ):
        prepare.prepare(corpus, tmp_path / "out", validation_fraction=0.5, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.bin").write_text("mine")
    with pytest.raises(DataError, match="there already"):
        prepare.prepare(corpus, tmp_path / "other", progress=False)
    assert (tmp_path / "other" / "train.bin").read_text() == "mine"


def test_command(corpus: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    argv = ["minigpt2", "prepare", "--data", str(corpus), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", argv)
    assert main() == 0
    assert "60 documents" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "tokens.json").read_text())["documents"] == 60
    monkeypatch.setattr("sys.argv", [*argv[:3], str(tmp_path / "nothing"), *argv[4:]])
    assert main() == 2
    assert capsys.readouterr().err.endswith("nothing: no such file or folder\n")


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The system refuses to write more than 100 bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_ruins_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with full_disk(), pytest.raises(OSError, match=rf"File too large: '{out}/\.part'"):
        prepare.prepare(corpus, out, progress=False)
    split_files = prepare.split
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "split", full_disk()(split_files))
        with pytest.raises(OSError, match=f"File too large: '{out}/train.bin'"):
            prepare.prepare(corpus, out, progress=False)
    assert [path.name for path in out.iterdir()] == [".part"]
    prepare.prepare(corpus, out, progress=False)
    prepare.prepare(corpus, tmp_path / "fresh", progress=False)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_disk_that_lost_tokens_is_noticed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "split", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare(corpus, out, progress=False)
    tokens = out / ".part" / "tokens.bin"
    size = tokens.stat().st_size
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"tokens\.bin: {size - 2} bytes, the journal says {size}; delete .*\.part"):
        prepare.prepare(corpus, out, progress=False)
