"""Text to tokens to batches: nothing is lost, seen twice, or drawn in an order that a resumed run cannot repeat."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from texts import load_corpus, read_documents

from minigpt2.data.batches import Batches, DataError, gather, in_order
from minigpt2.data.documents import standard_library
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer

TOKENS = np.arange(1003, dtype=np.uint16)


def firsts(batches, n):
    """The first token of each row of n batches; with TOKENS it tells the window."""
    return [row for input_ids, _ in itertools.islice(batches, n) for row in input_ids[:, 0].tolist()]


@pytest.fixture
def library(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"Document {i}. " * (i + 1))
    return tmp_path


def documents(tokens):
    """The texts of a split, which must end with <|endoftext|>."""
    *ends, last = np.flatnonzero(tokens == END_OF_TEXT).tolist()
    assert last == len(tokens) - 1
    starts = [0, *(end + 1 for end in ends)]
    return [get_tokenizer().decode(tokens[a:b].tolist()) for a, b in zip(starts, [*ends, last], strict=True)]


def test_targets_are_the_next_tokens():
    input_ids, targets = next(Batches(TOKENS, 4, 10, seed=0))
    assert input_ids.shape == targets.shape == (4, 10)
    assert input_ids.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, input_ids + 1)


def test_an_epoch_visits_every_window_once():
    batches = Batches(TOKENS, 4, 10, seed=0)
    assert batches.windows == 100
    for _ in range(3):
        assert sorted(firsts(batches, 25)) == list(range(0, 1000, 10))


def test_a_batch_may_cross_from_one_epoch_to_the_next():
    batches = Batches(TOKENS, 3, 10, seed=0)
    drawn = firsts(batches, 100)
    assert [sorted(drawn[i : i + 100]) for i in (0, 100, 200)] == 3 * [list(range(0, 1000, 10))]
    assert batches.position == 3 * batches.windows


def test_the_order_depends_on_the_seed_and_the_epoch():
    first = firsts(Batches(TOKENS, 4, 10, seed=0), 50)
    assert first == firsts(Batches(TOKENS, 4, 10, seed=0), 50)
    assert first[:100] != firsts(Batches(TOKENS, 4, 10, seed=1), 25)
    assert first[:100] != first[100:]
    assert first[:100] != sorted(first[:100])


@pytest.mark.parametrize("n", [0, 1, 24, 25, 33, 100])
def test_a_run_resumed_at_a_position_draws_what_the_uninterrupted_one_draws(n):
    whole = firsts(Batches(TOKENS, 3, 10, seed=7), n + 40)
    before = Batches(TOKENS, 3, 10, seed=7)
    firsts(before, n)
    after = Batches(TOKENS, 3, 10, seed=7)
    after.position = before.position
    assert firsts(after, 40) == whole[3 * n :]


def test_batches_that_were_prepared_are_those_that_come_and_move_no_position():
    whole, prepared = Batches(TOKENS, 3, 10, seed=7), Batches(TOKENS, 3, 10, seed=7)
    for _ in range(30):
        prepared.prepare(2)
        assert prepared.position == whole.position
        assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(next(prepared), next(whole), strict=True))
    prepared.prepare(2)
    prepared.position = whole.position = 1  # as when a snapshot is restored
    assert torch.equal(next(prepared)[0], next(whole)[0])


def test_drawing_leaves_the_global_random_states_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    expected = np.random.rand(), torch.rand(()).item()
    np.random.seed(0)
    torch.manual_seed(0)
    firsts(Batches(TOKENS, 4, 10, seed=0), 30)
    assert (np.random.rand(), torch.rand(()).item()) == expected


def test_data_that_just_suffices_for_one_batch():
    assert len(next(Batches(TOKENS[:41], 4, 10, seed=0))[0]) == 4
    with pytest.raises(DataError, match=r"40 tokens are too few for one batch: 4 x 10 needs 41"):
        Batches(TOKENS[:40], 4, 10, seed=0)


def test_validation_windows_come_in_order():
    assert firsts(in_order(TOKENS, 4, 10, most=2), 9) == list(range(0, 80, 10))
    assert firsts(in_order(TOKENS[:61], 4, 10, most=9), 9) == [0, 10, 20, 30, 40, 50]
    assert [len(x) for x, _ in in_order(TOKENS[:61], 4, 10, most=9)] == [4, 2]
    for input_ids, targets in in_order(TOKENS, 4, 10, most=2):
        assert torch.equal(targets, input_ids + 1)


def test_too_little_validation_data_is_an_error():
    assert firsts(in_order(TOKENS[:11], 4, 10, most=1), 2) == [0]
    with pytest.raises(DataError, match="10 validation tokens are too few for one window of 10"):
        next(in_order(TOKENS[:10], 4, 10, most=1))


def test_ids_above_32767_survive():
    input_ids, targets = gather(np.array([50256, 40000, 50255], dtype=np.uint16), [0], 2)
    assert (input_ids.tolist(), targets.tolist()) == ([[50256, 40000]], [[40000, 50255]])


def test_splits_hold_whole_documents_each_once(library):
    corpus = load_corpus(library, validation_fraction=0.2)
    train, validation = documents(corpus.train), documents(corpus.validation)
    texts = [path.read_text() for path in sorted(library.iterdir())]
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    assert corpus.train.dtype == corpus.validation.dtype == np.uint16
    assert 0.2 <= len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.35


def test_the_split_depends_on_the_texts_and_not_on_their_names(library):
    before = set(documents(load_corpus(library).validation))
    for i, path in enumerate(sorted(library.iterdir(), reverse=True)):
        path.rename(library / f"renamed-{i:02}.txt")
    assert set(documents(load_corpus(library).validation)) == before


def test_the_longest_document_is_trained_on(tmp_path):
    for i in range(8):
        (tmp_path / "long").write_text(f"A long story, number {i}. " * 500)
        (tmp_path / "short").write_text(f"A short story, number {i}. " * 10)
        corpus = load_corpus(tmp_path)
        assert documents(corpus.validation) == [(tmp_path / "short").read_text()]
        assert documents(corpus.train) == [(tmp_path / "long").read_text()]


def test_one_document_gives_its_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("A long story. " * 200)
    corpus = load_corpus(path, validation_fraction=0.1)
    ids = [*get_tokenizer().encode(path.read_text()), END_OF_TEXT]
    assert [*corpus.train, *corpus.validation] == ids
    assert len(corpus.validation) == len(ids) // 10


def test_two_tiny_documents_leave_validation_empty(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    corpus = load_corpus(tmp_path)
    assert (documents(corpus.train), len(corpus.validation)) == (["a", "b"], 0)


def test_end_of_text_written_in_a_document_is_text(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("before <|endoftext|> after")
    corpus = load_corpus(path, validation_fraction=0.0)
    assert corpus.train.tolist().count(END_OF_TEXT) == 1
    assert documents(corpus.train) == ["before <|endoftext|> after"]


def test_a_folder_is_read_in_the_order_of_paths_without_what_is_not_text(tmp_path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/d.md").write_text("thïrd", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("hidden")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert list(read_documents(tmp_path)) == ["first", "second", "thïrd"]


def test_a_folder_inside_a_hidden_one_is_read(tmp_path):
    inside = tmp_path / ".cache" / "corpus"
    inside.mkdir(parents=True)
    (inside / "a.txt").write_text("text")
    assert list(read_documents(inside)) == ["text"]


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin1\.txt: not UTF-8 text: .*position 2"):
        load_corpus(path)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing: no such file or folder"):
        load_corpus(tmp_path / "nothing")


@pytest.mark.parametrize("contents", [None, b"", b"\xff"])
def test_a_folder_without_text_is_named(tmp_path, contents):
    if contents is not None:
        (tmp_path / "file").write_bytes(contents)
    with pytest.raises(DataError, match=f"{tmp_path}: no text found"):
        load_corpus(tmp_path)


def test_the_standard_library_is_there_without_its_tests():
    sources = standard_library()
    assert len(sources) > 300
    assert Path(dataclasses.__file__) in sources
    assert not any({"test", "site-packages"} & set(path.parts[-3:]) for path in sources)
    assert next(read_documents(None)) == sources[0].read_text(encoding="utf-8")
