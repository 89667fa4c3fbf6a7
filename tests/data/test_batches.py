"""Tokens to batches: nothing is lost, seen twice, or drawn in an order that a resumed run cannot repeat."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt2.data.batches import Batches, DataError, fingerprint, gather, in_order, open_tokens

TOKENS = np.arange(1003, dtype=np.uint16)
WINDOWS = list(range(0, 1000, 10))


def firsts(batches, n: int) -> list[int]:
    """The first token of each row of n batches; with TOKENS it tells the window."""
    return [row for input_ids, _ in itertools.islice(batches, n) for row in input_ids[:, 0].tolist()]


def test_targets_are_the_next_tokens() -> None:
    for input_ids, targets in (next(Batches(TOKENS, 4, 10, seed=0)), next(in_order(TOKENS, 4, 10, most=1))):
        assert input_ids.shape == targets.shape == (4, 10)
        assert input_ids.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, (input_ids + 1) % len(TOKENS))


@pytest.mark.parametrize("batch", [3, 4])
def test_an_epoch_visits_every_window_once(batch: int) -> None:
    """Also where a batch crosses from one epoch to the next; and each epoch cuts its windows elsewhere."""
    batches = Batches(TOKENS, batch, 10, seed=0)
    drawn = firsts(batches, 300 // batch)
    cuts = set()
    for i in (0, 100, 200):  # the windows are what lies between their starts, but for the 3 tokens that are left over
        starts = np.sort(drawn[i : i + 100])
        gaps = np.diff([*starts, starts[0] + len(TOKENS)])
        assert sorted(gaps) == [10] * 99 + [13]
        cuts.add(int(starts[0]))
    assert len(cuts) == 3
    assert batches.position == 3 * batches.windows == 300


def test_a_window_over_the_end_goes_on_at_the_beginning() -> None:
    input_ids, targets = gather(TOKENS, [998], 7)
    assert input_ids.tolist() == [[998, 999, 1000, 1001, 1002, 0, 1]]
    assert targets.tolist() == [[999, 1000, 1001, 1002, 0, 1, 2]]


def test_each_seed_and_each_epoch_has_its_own_random_order() -> None:
    drawn = [firsts(Batches(TOKENS, 4, 10, seed), 75) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2]
    orders = {tuple(run[i : i + 100]) for run in drawn for i in (0, 100, 200)}
    assert len(orders) == 6
    for order in orders:  # tokens from one window to the next: 337 on average, with a deviation of 24
        assert 240 < np.abs(np.diff(order)).mean() < 440


def test_the_order_is_that_of_the_runs_that_exist() -> None:
    """Another one, such as that of another NumPy, would have resumed runs read windows twice."""
    assert firsts(Batches(TOKENS[:81], 8, 10, seed=3), 1) == [5, 15, 46, 36, 66, 76, 56, 26]


@pytest.mark.parametrize("n", [0, 1, 24, 25, 33, 100])
def test_a_run_resumed_at_a_position_draws_what_the_uninterrupted_one_draws(n: int) -> None:
    before, after = Batches(TOKENS, 3, 10, seed=7), Batches(TOKENS, 3, 10, seed=7)
    firsts(before, n)
    firsts(after, 50)  # nothing of which may stay
    after.position = before.position
    assert firsts(after, 40) == firsts(before, 40)


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
    drawn = []
    for n in (0, 30):
        np.random.seed(0)
        torch.manual_seed(0)
        firsts(Batches(TOKENS, 4, 10, seed=0), n)
        drawn.append((np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_each_batch(world: int) -> None:
    alone = Batches(TOKENS, 6, 10, seed=5)
    ranks = [Batches(TOKENS, 6, 10, 5, rank, world) for rank in range(world)]
    for batch, *parts in itertools.islice(zip(alone, *ranks, strict=True), 40):  # into the third epoch
        assert {len(input_ids) for input_ids, _ in parts} == {6 // world}
        assert all(torch.equal(torch.cat(rows), whole) for *rows, whole in zip(*parts, batch, strict=True))
    assert {rank.position for rank in ranks} == {alone.position}


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(DataError, match="a batch of 4 sequences cannot be shared evenly by 3 processes"):
        Batches(TOKENS, 4, 10, seed=5, world=3)


def test_data_that_just_suffices_for_one_batch() -> None:
    assert len(next(Batches(TOKENS[:41], 4, 10, seed=0))[0]) == 4
    with pytest.raises(DataError, match=r"40 tokens are too few for one batch: 4 x 10 needs 41"):
        Batches(TOKENS[:40], 4, 10, seed=0)


def test_validation_windows_come_in_order() -> None:
    assert firsts(in_order(TOKENS, 4, 10, most=2), 9) == WINDOWS[:8]
    assert firsts(in_order(TOKENS[:61], 4, 10, most=9), 9) == WINDOWS[:6]
    assert [len(x) for x, _ in in_order(TOKENS[:61], 4, 10, most=9)] == [4, 2]


def test_too_little_validation_data_is_an_error() -> None:
    assert firsts(in_order(TOKENS[:11], 4, 10, most=1), 2) == [0]
    with pytest.raises(DataError, match="10 validation tokens are too few for one window of 10"):
        next(in_order(TOKENS[:10], 4, 10, most=1))


def test_ids_above_32767_survive() -> None:
    input_ids, targets = gather(np.array([50256, 40000, 50255], dtype=np.uint16), [0], 2)
    assert (input_ids.tolist(), targets.tolist()) == ([[50256, 40000]], [[40000, 50255]])


def test_fingerprints_tell_corpora_apart() -> None:
    others = [TOKENS[:-1], TOKENS + np.uint16(1), TOKENS[::-1], TOKENS[:0]]
    assert fingerprint(TOKENS) == fingerprint(TOKENS.copy())
    assert len({fingerprint(tokens) for tokens in [TOKENS, *others]}) == 5


def test_a_file_of_half_a_token(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="3 bytes are not a whole number of uint16 tokens"):
        open_tokens(tmp_path / "odd.bin")
