"""Token files: the same tokens however they came about, in memory that does not grow."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import read_documents

from minigpt2.__main__ import main
from minigpt2.data import documents, prepare
from minigpt2.data.batches import Batches, fingerprint, open_corpus, open_tokens
from minigpt2.data.documents import DataError, read_pieces
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer


def encode(text: str) -> list[int]:
    return get_tokenizer().encode(text)


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


def test_files_hold_the_documents(corpus: Path, tmp_path: Path) -> None:
    meta = prepare.prepare(corpus, tmp_path / "out", validation_fraction=0.2, progress=False)
    train, validation = (open_tokens(tmp_path / "out" / name) for name in ("train.bin", "val.bin"))
    assert isinstance(train, np.memmap)
    assert train.dtype == np.uint16
    expected = [[*encode(text), END_OF_TEXT] for text in read_documents(corpus)]
    found = [
        part.tolist()
        for tokens in (train, validation)
        for part in np.split(tokens, np.flatnonzero(tokens == 50256) + 1)
    ]
    assert sorted(part for part in found if part) == sorted(expected)
    assert meta["documents"] == 60
    assert (meta["train_tokens"], meta["validation_tokens"]) == (len(train), len(validation))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokens.json", "train.bin", "val.bin"]


def test_processes_change_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare.prepare(corpus, tmp_path / "a", progress=False)
    started = []
    pool = prepare.ProcessPoolExecutor
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", lambda *args: started.append(args[0]) or pool(*args))
    monkeypatch.setattr(prepare, "SMALL", 0)
    prepare.prepare(corpus, tmp_path / "b", workers=2, progress=False)
    assert started == [2]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


TEXTS = st.text(st.sampled_from("ab'st 1.\n\t\r 　é漢😀" + "\x1c\x85"), max_size=60) | st.text(max_size=40)


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


@given(words=st.lists(st.text(st.sampled_from("abs'1.é漢\t"), max_size=4), max_size=40), size=st.integers(30, 50))
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


def test_twice_the_corpus_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 1 << 14)
    monkeypatch.setattr(prepare, "JOURNAL_EVERY", 1 << 14)
    get_tokenizer()
    peaks = []
    for n in (1, 2, 8):
        text = tmp_path / f"{n}.txt"
        with text.open("w") as file:
            for i in range(n * 20_000):
                file.write(f"The number {i} comes after {i - 1}.\n")
        tracemalloc.start()
        prepare.prepare(text, tmp_path / f"out{n}", workers=2, progress=False)
        batches = Batches(open_corpus(tmp_path / f"out{n}", "").train, 8, 32, seed=0)
        next(batches)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1.2 * peaks[0] + 100_000
    assert (tmp_path / "8.txt").stat().st_size > 2 * max(peaks)


def test_separator(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\nThree.")
    arguments = {"validation_fraction": 0.0, "progress": False}
    meta = prepare.prepare(tmp_path / "stories.txt", tmp_path / "out", separator="\n<|endoftext|>\n", **arguments)
    assert meta["documents"] == 3
    expected = [token for text in ("One.", "Two.", "Three.") for token in [*encode(text), END_OF_TEXT]]
    assert open_tokens(tmp_path / "out" / "train.bin").tolist() == expected
    meta = prepare.prepare(tmp_path / "stories.txt", tmp_path / "one", **arguments)
    assert meta["documents"] == 1


def test_a_folder_is_not_used_for_two_things(corpus: Path, tmp_path: Path) -> None:
    first = prepare.prepare(corpus, tmp_path / "out", progress=False)
    assert prepare.prepare(corpus, tmp_path / "out", progress=False) == first
    with pytest.raises(DataError, match="choose another folder"):
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


def test_a_file_of_half_a_token(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="3 bytes are not a whole number of uint16 tokens"):
        open_tokens(tmp_path / "odd.bin")


def test_fingerprints_tell_corpora_apart() -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    assert fingerprint(tokens) == fingerprint(tokens.copy())
    assert fingerprint(tokens) != fingerprint(tokens[:-1])
    assert fingerprint(tokens) != fingerprint(tokens + np.uint16(1))
