"""Recomputation as a dial: which blocks run a second time in the backward pass, and what is kept of them.

A stack of L blocks is cut into segments of k = `checkpoint_every` blocks, counted from the end, so that a remainder is
the *first* segment. Only the residual stream that enters a segment is kept; the inside of a segment is recomputed when
the backward pass reaches it. The last segment is never recomputed: its backward starts at once, so dropping it would
buy nothing. Hence exactly L - k blocks run twice, and every k from 1 (least memory) to L (none) is a real trade.

What else is kept is a second dial, `recompute`:

- `"block"`: nothing. The least memory.
- `"keep-attention"`: the results of attention, so that it never runs twice; nor does the last product of a segment,
  whose result the backward pass does not read.
- `"pointwise"`: in every block, recomputed by `checkpoint_every` or not, the results of attention and of the products,
  so that only LayerNorm, GELU and dropout run twice: nearly free in time. A segment that is recomputed keeps its input
  alone until then.

All three are one mechanism: a checkpoint (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
arXiv:1604.06174; torch.utils.checkpoint) and a list of operations whose results it keeps. A recomputation sees the
random state and the autocast of the first run, so that whatever is random inside a block repeats itself.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minigpt2.torch_private import transformed

__all__ = ["RECOMPUTE", "RecomputedStack", "Segment", "check_checkpoint_every", "check_recompute", "segments"]

RECOMPUTE = ("block", "keep-attention", "pointwise")
"""What is kept beside the input of a segment; see the top of this file."""

# The operations whose results are kept, by the names of PyTorch's dispatcher.
ATTENTION = (
    "minigpt2::attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)
SOFTMAX = ("aten::_softmax", "aten::_safe_softmax")  # a sign that attention is made of several operations
PRODUCTS = ("aten::addmm", "mkldnn::_linear_pointwise")
PRODUCTS_IN_A_BLOCK = 4


Contexts = Callable[[], Any]
"""Makes the two contexts in which a checkpoint runs a function for the first and for the second time."""


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
    """The segments of a stack, first to last. `checkpoint_every=0` gives one segment that is not recomputed."""
    k = check_checkpoint_every(checkpoint_every, n_layer) or n_layer
    starts = [0, *range(n_layer % k or k, n_layer, k)]
    return [Segment(a, b, recomputed=b < n_layer) for a, b in zip(starts, [*starts[1:], n_layer], strict=True)]


class RecomputedStack(nn.ModuleList):
    """Blocks that run one after the other, at a notch of the two dials."""

    @property
    def checkpoint_every(self) -> int:
        """0: no block is recomputed. k = 1..L: exactly L - k blocks are. May be changed between steps."""
        return self._checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, k: int) -> None:
        self._checkpoint_every = check_checkpoint_every(k, len(self))

    @property
    def recompute(self) -> str:
        """What is kept: "block", "keep-attention" or "pointwise". May be changed between steps."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: str) -> None:
        self._recompute = check_recompute(recompute)

    def run(self, x: Tensor, *args: object) -> Tensor:
        """Call each block as block(x, *args), x (B, T, C) being what the one before returned. Where no gradients are
        recorded, and under the transforms of torch.func, which know no checkpoints, nothing runs twice."""
        recording = torch.is_grad_enabled() and not transformed()
        for start, stop, recomputed in segments(len(self), self.checkpoint_every if recording else 0):
            blocks: list[Callable[..., Tensor]] = [self[i] for i in range(start, stop)]
            if recording and self.recompute == "pointwise":
                blocks = [_pointwise(block, recomputed) for block in blocks]
            segment = functools.partial(_in_turn, blocks)
            if recomputed:
                segment = functools.partial(_checkpointed, segment, _KEEPING[self.recompute])
            x = segment(x, *args)
        return x


def _in_turn(blocks: list[Callable[..., Tensor]], x: Tensor, *args: object) -> Tensor:
    for block in blocks:
        x = block(x, *args)
    return x


def _checkpointed(function: Callable[..., Tensor], contexts: Contexts | None, *args: object) -> Tensor:
    """Call function(*args), keeping `args` and the results that `contexts` keep; the rest is recomputed."""
    if contexts is None:
        # The whole function runs twice, with the hooks of the blocks.
        return cast("Tensor", checkpoint(function, *args, use_reentrant=False, early_stop=False))
    # The second run ends as soon as it has made what the backward pass reads, which is before the last product.
    return cast("Tensor", checkpoint(function, *args, use_reentrant=False, early_stop=True, context_fn=contexts))


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_Policy(()))


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_Policy(PRODUCTS))


_KEEPING: dict[str, Contexts | None] = {"block": None, "keep-attention": _keep_attention, "pointwise": None}


def _pointwise(block: Callable[..., Tensor], recomputed: bool) -> Callable[..., Tensor]:
    """The block, in which only what is cheap runs twice; `recomputed` where its segment is recomputed as well."""
    if not recomputed:
        return functools.partial(_checkpointed, block, _keep_products)
    if torch.compiler.is_compiling():  # what the compiler keeps it would keep from the first run on
        return block
    return functools.partial(_checkpointed, block, _KeepLater())


class _KeepLater:
    """`_keep_products` for a block inside a segment that is recomputed: nothing is kept in the first run of the
    segment, but in its second, which the backward pass begins and the recomputation of the block follows."""

    def __init__(self) -> None:
        self.first_run = True

    def __call__(self) -> tuple[Any, Any]:
        """The contexts of a run of the block, and of the recomputation that belongs to it."""
        if self.first_run:
            self.first_run = False
            return nullcontext(), self
        keeping, self.recomputing = _keep_products()
        return keeping, nullcontext()

    def __enter__(self) -> None:
        self.recomputing.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.recomputing.__exit__(*error)


class _Policy:
    """Which results of a run of a segment or block are kept: those of attention and of all `products` but the last."""

    def __init__(self, products: tuple[str, ...]) -> None:
        self.kept_products = products
        self.products: Counter[bool] = Counter()  # in the first run and, where PyTorch asks again, in the second

    def __call__(self, context: Any, operation: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
        if operation in _overloads(ATTENTION):
            return CheckpointPolicy.MUST_SAVE
        if operation in _overloads(self.kept_products):
            self.products[context.is_recompute] += 1
            # The result of a block's last product is added to the residual stream, and no backward pass reads it.
            if self.products[context.is_recompute] != PRODUCTS_IN_A_BLOCK:
                return CheckpointPolicy.MUST_SAVE
        if operation in _overloads(SOFTMAX):
            _warn_once()
        return CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _overloads(names: tuple[str, ...]) -> frozenset[Any]:
    """Those of the named operations that this PyTorch has."""
    packets: list[Any] = [getattr(getattr(torch.ops, n.split("::")[0]), n.split("::")[1], None) for n in names]
    return frozenset(packet.default for packet in packets if hasattr(packet, "default"))


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "attention is recomputed all the same: here it is not one operation whose result could be kept. Neither eager "
        'attention is, nor sdpa with dropout on a CPU; attention="fused" is',
        stacklevel=2,
    )
