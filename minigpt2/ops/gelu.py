"""GELU in its tanh form, forward and backward in one pass each.

On the CPU it is a function of the compiled kernel (csrc/gelu.cpp); elsewhere, or without a compiler, PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.ops import kernel
from minigpt2.ops.checks import check_alike
from minigpt2.torch_private import transformed

__all__ = ["gelu"]


def gelu(x: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of any shape (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    # A compiler fuses PyTorch's form with what stands beside it.
    if torch.compiler.is_compiling() or transformed() or not kernel.serves(x):
        return F.gelu(x, approximate="tanh")
    out: Tensor = kernel.gelu(x) if kernel.direct(x) else torch.ops.minigpt2.gelu(x)
    return out


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # this is to be differentiated in its turn
        twice: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
        return twice
    grad_x: Tensor = torch.ops.minigpt2.gelu_backward(grad, x)
    return grad_x


def _fake(x: Tensor, grad: Tensor | None = None) -> Tensor:
    check_alike(x, grad, "the gradient")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.define("minigpt2::gelu", "(Tensor x) -> Tensor")
torch.library.define("minigpt2::gelu_backward", "(Tensor grad, Tensor x) -> Tensor")
torch.library.impl("minigpt2::gelu", "CPU", kernel.gelu)
torch.library.impl("minigpt2::gelu_backward", "CPU", lambda grad, x: kernel.gelu(x, grad))
torch.library.register_fake("minigpt2::gelu", lambda x: _fake(x))
torch.library.register_fake("minigpt2::gelu_backward", lambda grad, x: _fake(x, grad))
torch.library.register_autograd(
    "minigpt2::gelu", _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
