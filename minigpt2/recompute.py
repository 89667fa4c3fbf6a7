"""Recomputation as a dial: which blocks run a second time in the backward pass, and how.

A stack of L blocks is cut into segments of k = `checkpoint_every` blocks, counted from the end, so that a remainder is
the *first* segment. Only the residual stream that enters a segment is kept; the inside of a segment is recomputed when
the backward pass reaches it. The last segment is never recomputed: its backward starts at once, so dropping it would
buy nothing. Hence exactly L - k blocks run twice, and every k from 1 (least memory) to L (none) is a real trade.

What a recomputed block keeps is a second dial, `recompute`:

- `"block"`: nothing but its input. The least memory.
- `"keep-attention"`: also the attention's output and log-sum-exp, so attention never runs twice; nor does the last
  product of a segment, whose result the backward pass does not need.
- `"pointwise"`: every block, recomputed by `checkpoint_every` or not, keeps what cost a matrix product or attention to
  make, and LayerNorm, GELU and dropout are recomputed: nearly free in time. Inside a segment that is recomputed this
  applies while it is recomputed.

The idea is that of Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; the machinery is PyTorch's own
torch.utils.checkpoint, with its selective policy for "keep-attention".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from minigpt2.ops.attention import attention_operations

__all__ = [
    "RECOMPUTE",
    "Segment",
    "check_checkpoint_every",
    "check_recompute",
    "recompute",
    "recompute_input",
    "segments",
]

RECOMPUTE = ("block", "keep-attention", "pointwise")
"""What a recomputed block keeps; see the top of this file."""


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


def check_recompute(recompute: str) -> str:
    """Return a value of the dial `recompute`; raise ValueError for any other."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    return recompute


def segments(n_layer: int, checkpoint_every: int) -> list[Segment]:
    """The segments of a stack, first to last. `checkpoint_every=0` gives one live segment."""
    k = check_checkpoint_every(checkpoint_every, n_layer) or n_layer
    starts = [0, *range(n_layer % k or k, n_layer, k)]
    return [Segment(a, b, recomputed=b < n_layer) for a, b in zip(starts, [*starts[1:], n_layer], strict=True)]


def recompute(function: Callable[..., Tensor], *args: object, keep_attention: bool = False) -> Tensor:
    """Call `function(*args)` keeping only `args`; its inside is recomputed, exactly, in the backward pass.

    With `keep_attention` the outputs of the attention operation are kept as well and it runs only once; and the second
    run ends where the backward pass has all it needs, which is before the last product of the segment. The random state
    and autocast of the first run are restored for the second, so dropout draws the same masks.
    """
    context_fn = functools.partial(create_selective_checkpoint_contexts, attention_operations())
    # To stop early is to leave the last block of the segment in the middle, by an exception; where nothing is kept we
    # promise whole blocks, run twice, hooks and all.
    settings: dict[str, Any] = {"use_reentrant": False, "early_stop": keep_attention}
    if keep_attention:
        settings["context_fn"] = context_fn
    return cast("Tensor", checkpoint(function, *args, **settings))


def recompute_input(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call `function(x)`, where the last thing that function does is a matrix product, keeping only x.

    The backward pass of the product needs its input, and that is recomputed; the product itself is not, because the
    recomputation stops as soon as it has what the backward pass asks for. Nothing inside may be random.
    """
    return cast("Tensor", checkpoint(function, x, use_reentrant=False, preserve_rng_state=False))
