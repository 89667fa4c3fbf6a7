"""Recomputation as a dial: which blocks run a second time in the backward pass, and what is kept of them.

A stack of L blocks is cut into segments of k = `checkpoint_every` blocks, counted from the end, so that a remainder is
the *first* segment. Only the residual stream that enters a segment is kept; the inside of a segment is recomputed when
the backward pass reaches it. The last segment is never recomputed: its backward starts at once, so dropping it would
buy nothing. Hence exactly L - k blocks run twice, and every k from 1 (least memory) to L (none) is a real trade.

What else is kept is a second dial, `recompute`:

- `"block"`: nothing.
- `"keep-attention"`: the results of attention, so that it never runs twice; nor does the last product of a segment,
  whose result the backward pass does not read.
- `"pointwise"`: in every block, also one that `checkpoint_every` does not recompute, the results of attention and of
  the products, so that only LayerNorm, GELU and dropout run again: nearly free in time. A segment that is recomputed
  keeps its input alone until its second run, and these results from then on.

All three are one mechanism: a checkpoint (`minigpt2/checkpoint.py`) and a list of operations whose results it keeps. A
recomputation sees the random state and the autocast of the first run, so that whatever is random inside a block repeats
itself. For torch.compile it is torch.utils.checkpoint, which the compiler knows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from minigpt2.checkpoint import Contexts, Kept, checkpoint
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
PRODUCTS = ("aten::addmm", "mkldnn::_linear_pointwise", "minigpt2::matmul")
PRODUCTS_IN_A_BLOCK = 4


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
    starts = [0, *range(n_layer % k or k, n_layer, k)]  # of 12 blocks at k = 5: 0, 2 and 7
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


def _checkpointed(function: Callable[..., Tensor], contexts: Callable[[], Contexts] | None, *args: object) -> Tensor:
    """Call function(*args), keeping `args` and the results that `contexts` keep; the rest is recomputed."""
    # Without a list of results the second run goes to the end, so that hooks that a user registered on a block are
    # called as in the first. With one it ends at the last tensor to be saved: a product saves what it reads before it
    # is made, so the last product is not made again.
    early_stop = contexts is not None
    if torch.compiler.is_compiling():
        from torch.utils import checkpoint as compiled

        settings: dict[str, Any] = {"context_fn": contexts} if contexts else {}
        call = compiled.checkpoint(function, *args, use_reentrant=False, early_stop=early_stop, **settings)
        return cast("Tensor", call)
    return checkpoint(function, *args, contexts=contexts() if contexts else None, early_stop=early_stop)


def _keep_attention() -> Contexts:
    return _keep(())


def _keep_products() -> Contexts:
    return _keep(PRODUCTS)


def _keep(products: tuple[str, ...]) -> Contexts:
    """Contexts that keep the results of attention and of all `products` of a segment or block but the last."""
    if not torch.compiler.is_compiling():
        return Kept(functools.partial(_Rule, products)).contexts()
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    rules = _Rule(products), _Rule(products)  # the compiler asks again for the second run

    def policy(context: Any, operation: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
        kept = rules[context.is_recompute](operation)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return cast("Contexts", create_selective_checkpoint_contexts(policy))


_KEEPING = {"block": None, "keep-attention": _keep_attention, "pointwise": None}


def _pointwise(block: Callable[..., Tensor], recomputed: bool) -> Callable[..., Tensor]:
    """The block, in which only what is cheap runs twice; `recomputed` where its segment is recomputed as well."""
    if not recomputed:
        return functools.partial(_checkpointed, block, _keep_products)
    if torch.compiler.is_compiling():  # what the compiler keeps it would keep from the first run on
        return block
    return functools.partial(_checkpointed, block, _KeepLater())


class _KeepLater:
    """`_keep_products` for a block inside a segment that is recomputed. The block runs three times:

    1. in the forward pass, with its segment: nothing is kept.
    2. when the backward pass reaches the segment, which runs again: the results of the products are kept.
    3. when the backward pass reaches the block: what is cheap runs again, and finds those results.

    Run 3 repeats run 1, so its context is made before run 1, and is this object; but what it is to find is kept in run
    2, which gives this object the context that finds it.
    """

    def __init__(self) -> None:
        self.first_run = True

    def __call__(self) -> Contexts:
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


class _Rule:
    """Whether the result of each operation of a run is kept: those of attention and of all `products` but the last."""

    def __init__(self, products: tuple[str, ...]) -> None:
        self.kept_products, self.products = products, 0

    def __call__(self, operation: Any) -> bool:
        if operation in _overloads(ATTENTION):
            return True
        if operation in _overloads(self.kept_products):
            self.products += 1
            # The result of a block's last product is added to the residual stream, and no backward pass reads it.
            return self.products != PRODUCTS_IN_A_BLOCK
        if operation in _overloads(SOFTMAX):
            _warn_once()
        return False


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
