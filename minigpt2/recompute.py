"""Recomputation as a dial: which blocks run a second time in the backward pass, and how.

A stack of L blocks is cut into segments of k = `checkpoint_every` blocks, counted from the end, so that a remainder is
the *first* segment. Only the residual stream that enters a segment is kept; the inside of a segment is recomputed when
the backward pass reaches it. The last segment is never recomputed: its backward starts at once, so dropping it would
buy nothing. Hence exactly L - k blocks run twice, and every k from 1 (least memory) to L (none) is a real trade.

The idea is that of Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["Segment", "check_checkpoint_every", "recompute", "segments"]


class Segment(NamedTuple):
    """Blocks `start` to `stop - 1` of the stack."""

    start: int
    stop: int
    recomputed: bool


def check_checkpoint_every(k: int, n_layer: int) -> int:
    """Return k if it is 0 (off) or 1..n_layer; raise ValueError otherwise."""
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= n_layer:
        raise ValueError(f"checkpoint_every must be an integer from 0 (off) to n_layer={n_layer}, got {k!r}")
    return k


def segments(n_layer: int, checkpoint_every: int) -> list[Segment]:
    """The segments of a stack, first to last. `checkpoint_every=0` gives one live segment."""
    k = check_checkpoint_every(checkpoint_every, n_layer) or n_layer
    starts = [0, *range(n_layer % k or k, n_layer, k)]
    return [Segment(a, b, recomputed=b < n_layer) for a, b in zip(starts, [*starts[1:], n_layer], strict=True)]


def recompute(function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call `function(*args)` keeping only `args`; its inside is recomputed, exactly, in the backward pass.

    The random state and autocast of the first run are restored for the second, so dropout draws the same masks.
    """
    # Stopping early would skip the end of the last block of a segment; we promise whole blocks, run twice, hooks and
    # all.
    result = checkpoint(function, *args, use_reentrant=False, early_stop=False)
    assert isinstance(result, Tensor)
    return result
