"""Tokens to batches: nothing is lost, seen twice, or drawn in an order that a resumed run cannot repeat."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt2.data.batches import Batches, DataError, fingerprint, gather, in_order, open_tokens

TOKENS = np.arange(1003, dtype=np.uint16)


def firsts(batches, n: int) -> list[int]:
    """The first token of each row of n batches; with TOKENS it tells the window."""
    return [row for input_ids, _ in itertools.islice(batches, n) for row in input_ids[:, 0].tolist()]


def test_targets_are_the_next_tokens() -> None:
    input_ids, targets = next(Batches(TOKENS, 4, 10, seed=0))
    assert input_ids.shape == targets.shape == (4, 10)
    assert input_ids.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, input_ids + 1)


@pytest.mark.parametrize("batch", [3, 4])
def test_an_epoch_visits_every_window_once(batch: int) -> None:
    """Also where a batch crosses from one epoch to the next."""
    batches = Batches(TOKENS, batch, 10, seed=0)
    assert batches.windows == 100
    drawn = firsts(batches, 300 // batch)
    for epoch in range(3):
        assert sorted(drawn[100 * epoch : 100 * (epoch + 1)]) == list(range(0, 1000, 10))


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    first = firsts(Batches(TOKENS, 4, 10, seed=0), 50)
    assert first == firsts(Batches(TOKENS, 4, 10, seed=0), 50)
    assert first[:100] != firsts(Batches(TOKENS, 4, 10, seed=1), 25)
    assert first[:100] != first[100:]
    assert first[:100] != sorted(first[:100])


def test_the_order_is_that_of_the_runs_that_exist() -> None:
    """Another one, such as that of another NumPy, would have resumed runs read windows twice."""
    assert firsts(Batches(TOKENS[:81], 8, 10, seed=3), 1) == [60, 70, 20, 10, 40, 50, 30, 0]


@pytest.mark.parametrize("n", [0, 1, 24, 25, 33, 100])
def test_a_run_resumed_at_a_position_draws_what_the_uninterrupted_one_draws(n: int) -> None:
    whole = firsts(Batches(TOKENS, 3, 10, seed=7), n + 40)
    before = Batches(TOKENS, 3, 10, seed=7)
    firsts(before, n)
    after = Batches(TOKENS, 3, 10, seed=7)
    after.position = before.position
    assert firsts(after, 40) == whole[3 * n :]


def test_going_back_draws_the_same_again() -> None:
    batches = Batches(TOKENS, 3, 10, seed=7)
    drawn = firsts(batches, 80)
    batches.position = 90
    assert firsts(batches, 50) == drawn[90:]


def test_batches_that_were_prepared_are_those_that_come_and_move_no_position() -> None:
    whole, prepared = Batches(TOKENS, 3, 10, seed=7), Batches(TOKENS, 3, 10, seed=7)
    for _ in range(30):
        prepared.prepare(2)
        assert prepared.position == whole.position
        assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(next(prepared), next(whole), strict=True))
    prepared.prepare(2)
    prepared.position = whole.position = 1  # as when a snapshot is restored
    assert torch.equal(next(prepared)[0], next(whole)[0])


def test_drawing_leaves_the_global_random_states_alone() -> None:
    def draw() -> tuple[float, float]:
        return np.random.rand(), torch.rand(()).item()

    np.random.seed(0)
    torch.manual_seed(0)
    expected = draw()
    np.random.seed(0)
    torch.manual_seed(0)
    firsts(Batches(TOKENS, 4, 10, seed=0), 30)
    assert draw() == expected


def test_no_process_reads_anothers_rows() -> None:
    alone = Batches(TOKENS, 4, 10, seed=5)
    ranks = [Batches(TOKENS, 4, 10, seed=5, rank=rank, world=2) for rank in range(2)]
    for batch, *parts in itertools.islice(zip(alone, *ranks, strict=True), 30):
        assert torch.equal(torch.cat([part[0] for part in parts]), batch[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), batch[1])
        assert {len(part[0]) for part in parts} == {2}
    assert alone.position == ranks[0].position == ranks[1].position


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(DataError, match="a batch of 4 sequences cannot be shared evenly by 3 processes"):
        Batches(TOKENS, 4, 10, seed=5, world=3)


def test_data_that_just_suffices_for_one_batch() -> None:
    assert len(next(Batches(TOKENS[:41], 4, 10, seed=0))[0]) == 4
    with pytest.raises(DataError, match=r"40 tokens are too few for one batch: 4 x 10 needs 41"):
        Batches(TOKENS[:40], 4, 10, seed=0)


def test_validation_windows_come_in_order() -> None:
    assert firsts(in_order(TOKENS, 4, 10, most=2), 9) == list(range(0, 80, 10))
    assert firsts(in_order(TOKENS[:61], 4, 10, most=9), 9) == [0, 10, 20, 30, 40, 50]
    assert [len(x) for x, _ in in_order(TOKENS[:61], 4, 10, most=9)] == [4, 2]
    for input_ids, targets in in_order(TOKENS, 4, 10, most=2):
        assert torch.equal(targets, input_ids + 1)


def test_too_little_validation_data_is_an_error() -> None:
    assert firsts(in_order(TOKENS[:11], 4, 10, most=1), 2) == [0]
    with pytest.raises(DataError, match="10 validation tokens are too few for one window of 10"):
        next(in_order(TOKENS[:10], 4, 10, most=1))


def test_ids_above_32767_survive() -> None:
    input_ids, targets = gather(np.array([50256, 40000, 50255], dtype=np.uint16), [0], 2)
    assert (input_ids.tolist(), targets.tolist()) == ([[50256, 40000]], [[40000, 50255]])


def test_fingerprints_tell_corpora_apart() -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    assert fingerprint(tokens) == fingerprint(tokens.copy())
    assert fingerprint(tokens) != fingerprint(tokens[:-1])
    assert fingerprint(tokens) != fingerprint(tokens + np.uint16(1))


def test_a_file_of_half_a_token(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="3 bytes are not a whole number of uint16 tokens"):
        open_tokens(tmp_path / "odd.bin")
