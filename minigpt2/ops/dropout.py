"""Dropout on the way into the residual stream, of which the backward pass needs a seed and no mask.

On the CPU it is a function of the compiled kernel (csrc/), with the mask that attention uses: a function of
seed, row and column. Elsewhere, or without a compiler, it is PyTorch's own dropout, which keeps a mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.ops import build
from minigpt2.ops.attention.fused import DTYPES, unavailable
from minigpt2.ops.seed import draw_seed
from minigpt2.torch_private import constant_to_compiler

__all__ = ["dropout_add"]


def dropout_add(x: Tensor, residual: Tensor | None, p: float) -> Tensor:
    """residual + dropout(x), or dropout(x) alone, for tensors (..., C) of one shape; p in [0, 1).

    What is kept is scaled by 1 / (1 - p). The seed comes from torch's default generator.
    """
    if not p:
        return x if residual is None else residual + x
    if residual is not None:
        x = x.to(residual.dtype)  # under autocast the residual stream is float32 and what is added to it is not
    if not _served(x.device.type, x.dtype):
        dropped = F.dropout(x, p)
        return dropped if residual is None else residual + dropped
    out: Tensor = torch.ops.minigpt2.dropout_add(x, residual, p, draw_seed(x))
    return out


@constant_to_compiler
def _served(device: str, dtype: torch.dtype) -> bool:
    return device == "cpu" and unavailable(device, dtype, 64) is None


torch.library.define("minigpt2::dropout_add", "(Tensor x, Tensor? residual, float p, Tensor seed) -> Tensor")


@torch.library.impl("minigpt2::dropout_add", "CPU")
def _dropout_add(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, x {x.dtype} {tuple(x.shape)}")
    kernel = build.kernel()
    if isinstance(kernel, str):
        raise RuntimeError(f"dropout_add is not available: {kernel}")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    width = x.size(-1)
    addresses = x.data_ptr(), None if residual is None else residual.data_ptr(), out.data_ptr()
    kernel.minigpt2_dropout_add(DTYPES[x.dtype], x.numel() // max(1, width), width, *addresses, p, seed.data_ptr())
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The seed is not a saved tensor, which recomputation would make again: so it can stop at the product before.
    _, residual, ctx.p, ctx.seed = inputs
    ctx.has_residual = residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    return torch.ops.minigpt2.dropout_add(grad, None, ctx.p, ctx.seed), grad if ctx.has_residual else None, None, None


torch.library.register_fake("minigpt2::dropout_add", lambda x, residual, p, seed: torch.empty_like(x).contiguous())
torch.library.register_autograd("minigpt2::dropout_add", _backward, setup_context=_save)
