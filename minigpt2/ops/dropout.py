"""Dropout on the way into the residual stream, of which the backward pass needs a seed and no mask.

On the CPU it is a function of the compiled kernel (csrc/dropout.cpp), with the mask that attention uses: a function of
seed, row and column. Elsewhere, or without a compiler, it is PyTorch's own dropout, which keeps a mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.ops import kernel
from minigpt2.ops.checks import check_alike, check_seed
from minigpt2.ops.seed import draw_seed
from minigpt2.torch_private import transformed

__all__ = ["dropout_add"]


def dropout_add(x: Tensor, residual: Tensor | None, p: float) -> Tensor:
    """residual + dropout(x), or dropout(x) alone, for tensors (..., C) of one shape and device; p in [0, 1].

    What is kept is scaled by 1 / (1 - p). The seed comes from torch's default generator. Raises ValueError for other
    shapes, devices or probabilities.
    """
    if residual is not None and (residual.shape, residual.device) != (x.shape, x.device):
        ours, theirs = (f"{tuple(t.shape)} on {t.device}" for t in (x, residual))
        raise ValueError(f"x and residual must have one shape and device, got {ours} and {theirs}")
    if not p:
        return x if residual is None else residual + x
    if residual is not None:
        x = x.to(residual.dtype)  # under autocast the residual stream is float32 and what is added to it is not
    if transformed() or not kernel.serves(x):
        dropped = F.dropout(x, p)
        return dropped if residual is None else residual + dropped
    out: Tensor = torch.ops.minigpt2.dropout_add(x, residual, p, draw_seed(x))
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The seed is not a saved tensor, which recomputation would make again: so it can stop at the product before.
    _, residual, ctx.p, ctx.seed = inputs
    ctx.has_residual = residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    return torch.ops.minigpt2.dropout_add(grad, None, ctx.p, ctx.seed), grad if ctx.has_residual else None, None, None


def _fake(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    check_alike(x, residual, "residual")
    check_seed(seed, p, x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.define("minigpt2::dropout_add", "(Tensor x, Tensor? residual, float p, Tensor seed) -> Tensor")
torch.library.impl("minigpt2::dropout_add", "CPU", kernel.dropout_add)
torch.library.register_fake("minigpt2::dropout_add", _fake)
torch.library.register_autograd("minigpt2::dropout_add", _backward, setup_context=_save)
