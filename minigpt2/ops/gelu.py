"""GELU in its tanh form, forward and backward in one pass each.

On the CPU it is a function of the compiled kernel (csrc/attention.cpp); elsewhere, or without a compiler, PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.ops import build
from minigpt2.ops.attention.fused import DTYPES, unavailable
from minigpt2.torch_private import constant_to_compiler

__all__ = ["gelu"]


def gelu(x: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of any shape (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    # A compiler fuses PyTorch's form with what stands beside it.
    if torch.compiler.is_compiling() or not _served(x.device.type, x.dtype):
        return F.gelu(x, approximate="tanh")
    out: Tensor = torch.ops.minigpt2.gelu(x)
    return out


@constant_to_compiler
def _served(device: str, dtype: torch.dtype) -> bool:
    return device == "cpu" and unavailable(device, dtype, 64) is None


torch.library.define("minigpt2::gelu", "(Tensor x) -> Tensor")
torch.library.define("minigpt2::gelu_backward", "(Tensor grad, Tensor x) -> Tensor")


def _run(x: Tensor, grad: Tensor | None) -> Tensor:
    kernel = build.kernel()
    if isinstance(kernel, str):
        raise RuntimeError(f"gelu is not available: {kernel}")
    x, grad = x.contiguous(), None if grad is None else grad.contiguous()
    out = torch.empty_like(x)
    address = None if grad is None else grad.data_ptr()
    kernel.minigpt2_gelu(DTYPES[x.dtype], x.numel(), x.data_ptr(), address, out.data_ptr())
    return out


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    grad_x: Tensor = torch.ops.minigpt2.gelu_backward(grad, *ctx.saved_tensors)
    return grad_x


def _no_second_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("gelu has no second derivative here; use torch.nn.functional.gelu for that")


torch.library.impl("minigpt2::gelu", "CPU", lambda x: _run(x, None))
torch.library.impl("minigpt2::gelu_backward", "CPU", lambda grad, x: _run(x, grad))
torch.library.register_fake("minigpt2::gelu", lambda x: torch.empty_like(x).contiguous())
torch.library.register_fake("minigpt2::gelu_backward", lambda grad, x: torch.empty_like(x).contiguous())
torch.library.register_autograd(
    "minigpt2::gelu", _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
torch.library.register_autograd("minigpt2::gelu_backward", _no_second_backward)
