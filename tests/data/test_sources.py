"""Data as people have it: what is text is read as what it is, what is not is counted, named and left out."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from minigpt2.data import documents as documents_module
from minigpt2.data.batches import Corpus, check_enough, open_corpus, open_tokens
from minigpt2.data.documents import DataError, TextOptions
from minigpt2.data.prepare import prepare, tokenise
from minigpt2.data.sources import Survey, survey
from minigpt2.extras import MissingExtra
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer

TEXT = "A naïve café, and a line of text.\n"
FORGIVING = TextOptions(allow_left_out=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    return folder


def documents(data: Path, tmp_path: Path, text: TextOptions = FORGIVING) -> list[str]:
    """What is read of `data`: the texts of its tokens."""
    part = Path(tmp_path, "part")
    part.mkdir()
    tokenise(data, part, text)
    tokens = open_tokens(part / "tokens.bin")
    *found, rest = np.split(tokens, np.flatnonzero(tokens == END_OF_TEXT) + 1)
    assert not len(rest)
    for file in part.iterdir():
        file.unlink()
    part.rmdir()
    return [get_tokenizer().decode(document[:-1].tolist()) for document in found]


def looked(data: Path, tmp_path: Path, text: TextOptions = FORGIVING) -> Survey:
    return survey(data, text, tmp_path / "list")


@pytest.mark.parametrize(
    "contents",
    [
        TEXT.encode("latin-1"),
        TEXT.encode("utf-16-le"),
        b"plain as it looks".decode().encode("utf-16-le"),
        "漢字".encode("shift-jis"),
        b"\xed\xa0\x80 a surrogate",
        b"\xc0\xaf overlong",
        b"cut \xe2\x82",
        b"\x89PNG\r\n\x1a\n\0\0",
        bytes(range(256)),
    ],
)
def test_what_is_not_utf8_is_named_alone_and_left_out_of_a_folder(
    folder: Path, tmp_path: Path, contents: bytes
) -> None:
    (folder / "bad").write_bytes(contents)
    with pytest.raises(DataError, match=r"bad: not UTF-8 text: .* position \d+.*--encoding"):
        prepare(folder / "bad", tmp_path / "out", progress=False)
    with pytest.raises(DataError, match=r"no text found; left out: 1 not UTF-8 \(bad\); --encoding"):
        prepare(folder, tmp_path / "out", progress=False)
    for i in range(9):
        (folder / f"{i}").write_text(TEXT, encoding="utf-8")
    assert looked(folder, tmp_path, TextOptions()).line() == f"{folder}: 9 files of text; left out: 1 not UTF-8 (bad)"
    (folder / "worse").write_bytes(contents)
    with pytest.raises(DataError, match=r"2 of 11 files .* more than a tenth: 2 not UTF-8 \(bad, worse\)"):
        prepare(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert prepare(folder, tmp_path / "out", FORGIVING, progress=False)["left_out"] == {"not UTF-8": 2}


def test_the_encoding_is_for_the_files_that_are_not_utf8(folder: Path, tmp_path: Path) -> None:
    for name, encoding in {"a": "utf-8", "b": "cp1252", "c": "utf-16", "d": "utf-8-sig"}.items():
        (folder / name).write_bytes((name + TEXT).encode(encoding))
    assert documents(folder, tmp_path, TextOptions(encoding="cp1252")) == [name + TEXT for name in "abcd"]


@pytest.mark.parametrize("encoding", ["abacus", "hex", ""])
def test_an_unknown_encoding(folder: Path, tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match=f"unknown encoding '{encoding}'"):
        prepare(folder, tmp_path / "out", TextOptions(encoding=encoding), progress=False)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_a_byte_order_mark_tells_the_encoding_and_is_dropped(folder: Path, tmp_path: Path, encoding: str) -> None:
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (folder / "marked").write_bytes(mark + TEXT.encode(encoding))
    assert documents(folder, tmp_path) == documents(folder / "marked", tmp_path) == [TEXT]


def compressed(how: str, contents: bytes) -> bytes:
    if how == "gz":
        return gzip.compress(contents[:9]) + gzip.compress(contents[9:])  # two members
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.ZstdCompressor().compress(part) for part in (contents[:9], contents[9:])]
    return b"\x50\x2a\x4d\x18\4\0\0\0skip" + b"".join(frames)


@pytest.mark.parametrize("how", ["gz", "zst"])
def test_compressed_text_is_read_and_damage_is_noticed(folder: Path, tmp_path: Path, how: str) -> None:
    contents = compressed(how, (TEXT * 50).encode())
    (folder / f"a.txt.{how}").write_bytes(contents)
    (folder / "named-otherwise.txt").write_bytes(contents)
    assert documents(folder, tmp_path) == 2 * [TEXT * 50]
    (folder / "cut").write_bytes(contents[:-3])
    (folder / "flipped").write_bytes(contents[:40] + bytes([contents[40] ^ 255]) + contents[41:])
    found = looked(folder, tmp_path)
    assert (found.files, sum(found.left_out.values())) == (2, 2)
    with pytest.raises(DataError, match="cut: damaged: "):
        prepare(folder / "cut", tmp_path / "out", progress=False)


def test_zstd_without_its_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    (folder / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(MissingExtra, match=r"a\.zst: .*pip install 'minigpt2\[zstd\]'"):
        prepare(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_parquet_without_its_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "a.parquet").write_bytes(b"PAR1\0\0PAR1")
    with pytest.raises(MissingExtra, match=r"a\.parquet: .*pip install 'minigpt2\[parquet\]'"):
        prepare(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_json_lines_are_documents(folder: Path, tmp_path: Path) -> None:
    values = ["one\u2028line", "two\nlines", "😀", "", None, "last"]
    lines = "\n".join(json.dumps({"text": value, "body": f"body of {value!r}"}) for value in values)
    (folder / "a.jsonl").write_text(lines + "\n\n")
    (folder / "b.ndjson.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "\\ud800 alone"}'))
    assert documents(folder, tmp_path) == ["one\u2028line", "two\nlines", "😀", "last", "\ufffd alone"]
    assert documents(folder / "a.jsonl", tmp_path, TextOptions(field="body"))[1] == "body of 'two\\nlines'"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{}", "line 2 has no field 'text'; it has none: --field"),
        ('{"body": "x"}', "line 2 has no field 'text'; it has 'body': --field"),
        ('["text"]', "line 2 has no field 'text'"),
        ('{"text": 7}', "line 2: field 'text' is no text: 7"),
        ("plain", "line 2 is not JSON: "),
    ],
)
def test_a_line_without_text_is_named(folder: Path, tmp_path: Path, line: str, problem: str) -> None:
    (folder / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=rf"a\.jsonl: {problem}"):
        prepare(folder / "a.jsonl", tmp_path / "out", progress=False)


def test_parquet_rows_are_documents(folder: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = ["one", None, "", "zwei -- drei", "four"]
    table = arrow.table({"text": values, "body": arrow.array(values).dictionary_encode(), "n": [1, 2, 3, 4, 5]})
    parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    assert documents(folder, tmp_path) == ["one", "zwei -- drei", "four"]
    assert documents(folder, tmp_path, TextOptions(field="body")) == ["one", "zwei -- drei", "four"]
    for field, problem in {
        "title": "no column 'title'; it has 'text', 'body', 'n'",
        "n": "is no text but int64",
    }.items():
        with pytest.raises(DataError, match=problem):
            prepare(folder / "a.parquet", tmp_path / "out", TextOptions(field=field), progress=False)
    (folder / "cut.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-9])
    assert looked(folder, tmp_path).left_out == {"damaged": 1}


@pytest.mark.parametrize("magic", [b"PK\3\4", b"BZh91AY", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\7\0"])
def test_other_compression_is_left_out(folder: Path, tmp_path: Path, magic: bytes) -> None:
    (folder / "archive").write_bytes(magic + bytes(100))
    with pytest.raises(DataError, match=r"no text found; left out: 1 compressed \(archive\)"):
        prepare(folder, tmp_path / "out", progress=False)


def test_links_are_followed_once(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (folder / ".store").mkdir()
    for path in (folder / "b", elsewhere / "x", elsewhere / "deep" / "y", folder / ".store" / "z"):
        path.write_text(path.name)
    targets = {
        "a1": elsewhere,
        "a2": elsewhere,
        "a3": folder,
        "a4": tmp_path,
        "a5": folder / "b",
        "a6": tmp_path / "no",
    }
    targets |= {"c": folder / ".store" / "z", "d": elsewhere / "deep"}
    for name, target in targets.items():
        (folder / name).symlink_to(target)
    (elsewhere / "loop").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert documents(folder, tmp_path) == ["y", "x", "b", "z"]
    found = looked(folder, tmp_path)
    assert found.left_out == {"hidden": 1, "link to what is read already": 7, "broken link": 1}
    assert "left out: 1 hidden (.store); 7 link to what is read already (a1/back, a1/loop, a2, ...)" in found.line()


def test_runs_models_and_tokens_in_the_folder_are_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "text.txt").write_text(TEXT * 9, encoding="utf-8")
    for mark in ("runs/a/train_config.json", "weights/gpt2/model.safetensors"):
        (folder / mark).parent.mkdir(parents=True)
        (folder / mark).write_text("{}")
    prepare(folder, folder / "tokens", progress=False)
    assert documents(folder, tmp_path, TextOptions()) == [TEXT * 9]
    reasons = {"folder of a run": 1, "folder of a model": 1, "folder of tokens": 1}
    assert looked(folder, tmp_path, TextOptions()).left_out == reasons
    for name, what in {"runs/a": "a run", "tokens": "tokens; train.py and eval take them as they are"}.items():
        with pytest.raises(DataError, match=f"{folder / name}: no folder of text but one of {what}"):
            prepare(folder / name, tmp_path / "out", progress=False)


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b", ".c"]])
def test_a_folder_of_nothing(folder: Path, tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).touch()
    with pytest.raises(DataError, match=f"no text found; {r'left out: .*empty' if names else 'the folder is empty'}"):
        prepare(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_second_prepare_says_what_changed(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c", "sub/d"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"Text {name}. " * 20)
    out = tmp_path / "out"
    first = prepare(folder, out, progress=False)
    os.utime(folder / "a", (1, 1))
    moved = folder.rename(tmp_path / "moved")
    assert prepare(moved, out, progress=False) == first  # touched and moved, but the same
    before = (out / "train.bin").read_bytes()
    (moved / "a").write_text("Text A. " * 20)  # of the same size
    (moved / "b").unlink()
    (moved / "c").rename(moved / "sub" / "e")
    (moved / "f").write_text("new")
    words = "1 file added (f), 1 file changed (a), 1 file removed (b), 1 file renamed (c to sub/e)"
    with pytest.raises(DataError) as error:
        prepare(moved, out, progress=False)
    assert words in str(error.value)
    assert "--renew" in str(error.value)
    assert (out / "train.bin").read_bytes() == before
    renewed = prepare(moved, out, renew=True, progress=False)
    prepare(moved, tmp_path / "fresh", progress=False)
    assert renewed == json.loads((tmp_path / "fresh" / "tokens.json").read_text())
    for name in ("train.bin", "val.bin", "files.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_tokens_that_no_list_tells_of_are_not_taken_for_new(folder: Path, tmp_path: Path) -> None:
    (folder / "a").write_text(TEXT * 20, encoding="utf-8")
    prepare(folder, tmp_path / "out", progress=False)
    (tmp_path / "out" / "files.jsonl").unlink()
    with pytest.raises(DataError, match=r"no files\.jsonl in it tells"):
        prepare(folder, tmp_path / "out", progress=False)


def fed(path: Path, contents: bytes) -> threading.Thread:
    """A pipe at `path`, into which a thread writes."""
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=(contents,), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("how", ["plain", "gz", "jsonl"])
def test_a_pipe_is_read_once(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # and no processes have to start
    contents = (TEXT * 5000).encode()
    contents = {"gz": gzip.compress(contents), "jsonl": json.dumps({"text": TEXT * 5000}).encode()}.get(how, contents)
    thread = fed(tmp_path / "pipe", contents)
    assert documents(tmp_path / "pipe", tmp_path, TextOptions(field="text" if how == "jsonl" else None)) == [
        TEXT * 5000
    ]
    thread.join(10)


def test_a_pipe_cannot_be_compared_and_may_be_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    pipe, out = tmp_path / "pipe", tmp_path / "out"
    fed(pipe, (TEXT * 50).encode())
    prepare(pipe, out, progress=False)
    with pytest.raises(DataError, match=r"1 file changed \(pipe\); --renew"):
        prepare(pipe, out, progress=False)
    with pytest.raises(DataError, match="/dev/null: no text found"):
        prepare("/dev/null", tmp_path / "nothing", progress=False)
    assert not (tmp_path / "nothing").exists()


def test_a_pipe_in_a_folder_is_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "a").write_text("text")
    os.mkfifo(folder / "pipe")
    assert looked(folder, tmp_path).left_out == {"neither file nor folder": 1}


@pytest.mark.parametrize("kind", ["gz", "jsonl", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "PIECE", 1 << 14)
    peaks = []
    for n in (20_000, 100_000):
        lines = (f"The number {i} comes after {i - 1}.\n" for i in range(n))
        path = tmp_path / f"{n}.{kind}"
        if kind == "parquet":
            arrow = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(
                arrow.table({"text": list(lines)}), path, row_group_size=5000
            )
        else:
            opener = gzip.open if kind.endswith("gz") else open
            with opener(path, "wt") as file:
                file.writelines(json.dumps({"text": line}) + "\n" if "jsonl" in kind else line for line in lines)
        tracemalloc.start()
        survey(path, TextOptions(), tmp_path / "list")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 200_000


def test_end_of_text_in_the_text_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a").write_text("One.<|endoftext|>Two.<|endoftext|>Three." * 20)
    prepare(folder, tmp_path / "a", progress=True)
    said = "<|endoftext|> is in the text, and read as text; --separator '<|endoftext|>' cuts there"
    assert capsys.readouterr().out.count(said) == 1
    prepare(folder, tmp_path / "b", TextOptions("<|endoftext|>"), progress=True)
    assert said not in capsys.readouterr().out


def test_a_run_that_begins_anew_does_not_take_old_tokens(folder: Path, tmp_path: Path) -> None:
    (folder / "a").write_text("Old. " * 50)
    old = open_corpus(folder, tmp_path / "tokens")
    (folder / "a").write_text("New. " * 50)
    assert [*open_corpus(folder, tmp_path / "tokens").train] == [*old.train]
    new = open_corpus(folder, tmp_path / "tokens", renew=True)
    assert get_tokenizer().decode(new.train[:2].tolist()) == "New."


@pytest.mark.parametrize(
    ("train", "validation"), [(2000, 30), (900, 300), (40, 5), (2049, 256), (1, 1), (0, 0), (50, 1)]
)
@pytest.mark.parametrize("world", [1, 4])
def test_too_little_data_says_what_fits(train: int, validation: int, world: int) -> None:
    corpus = Corpus(np.zeros(train, dtype=np.uint16), np.zeros(validation, dtype=np.uint16))
    with pytest.raises(DataError) as error:
        check_enough(corpus, 8, 256, world)
    message = str(error.value)
    assert f"{train:,} training and {validation:,} validation tokens are too few" in message
    assert "--batch 8 --length 256 needs 2,049 and 257" in message
    if min(train, validation) < 2:
        assert message.endswith("more text is needed")
    else:
        batch, length = (int(word) for word in message.rpartition(" --batch ")[2].split()[:3:2])
        assert batch % world == 0
        check_enough(corpus, batch, length, world)
    enough = Corpus(np.zeros(2049, dtype=np.uint16), np.zeros(257, dtype=np.uint16))
    check_enough(enough, 8, 256, world)
