"""The model's products with its weights, which generation makes for a few rows at a time.

For few rows the time goes into reading the weights. The compiled kernel (attention/cpu.cpp) reads them nearer to the
rate of memory than a general matrix product does (`minigpt2 bench generate` says how near), and serves what
generation needs: float32 without gradients. torch.addmm and torch.mm serve the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minigpt2 import build

__all__ = ["MAX_ROWS", "project", "project_transposed"]

MAX_ROWS = 8


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias, for x (n, in), weight (in, out) and bias (out): (n, out)."""
    if weight.size(1) % 32 == 0 and _served(x, weight):
        return _few_rows(x, weight, bias, weight.size(1))
    return torch.addmm(bias, x, weight)


def project_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T, for x (n, in) and weight (out, in): (n, out)."""
    if weight.size(1) % 16 == 0 and _served(x, weight):
        return _few_rows(x, weight, None, weight.size(0))
    return torch.mm(x, weight.t())


def _served(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is to make this product. Ordered so that training leaves at the first question."""
    return (
        not torch.is_grad_enabled()
        and 0 < x.size(0) <= MAX_ROWS
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.stride(1) == 1
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and not isinstance(build.kernel(), str)
    )


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, n_out: int) -> Tensor:
    kernel: Any = build.kernel()
    out = torch.empty(x.size(0), n_out)
    address = None if bias is None else bias.data_ptr()
    addresses = weight.data_ptr(), address, out.data_ptr()
    if kernel.minigpt2_few_rows(*x.shape, n_out, x.data_ptr(), x.stride(0), *addresses):
        raise MemoryError("a product could not allocate its scratch memory")
    return out
