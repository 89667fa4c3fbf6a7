"""The implementations of the attention operation, so that one test takes them all.

- cpu: the C++ kernel.
- interpreter: the Triton kernels in Triton's interpreter, on the CPU. It is slow: tests give it fewer cases.
- cuda: the Triton kernels on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minigpt2.ops.attention.fused import TRITON

IMPLEMENTATIONS = ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = {"cpu": [torch.float32, torch.bfloat16, torch.float64]}
DTYPES["interpreter"] = DTYPES["cuda"] = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0x0123_4567_89AB_CDEF


def for_each(cases: Sequence[tuple[Any, ...]], interpreted: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Parameters (implementation, *case) of a test: all cases; for the interpreter fewer, to which `-m grid` adds."""
    cuda = [pytest.param("cuda", *case, marks=pytest.mark.cuda) for case in cases]
    rest = [pytest.param("interpreter", *case, marks=pytest.mark.grid) for case in cases if case not in interpreted]
    return [("cpu", *case) for case in cases] + [("interpreter", *case) for case in interpreted] + cuda + rest


class Operation:
    """The operation, called like torch.ops.minigpt2.attention, and what tests must know of it."""

    device = "cpu"
    tile = 1  # what is not finite may reach what it should not within so many rows, from a multiple of it on

    def __call__(self, qkv: Tensor, n_head: int, p: float = 0.0, seed: int = SEED) -> tuple[Tensor, Tensor]:
        on = self.device
        out, lse = torch.ops.minigpt2.attention(qkv.to(on), n_head, p, torch.tensor(seed, device=on) if p else None)
        return out.to(qkv.device), lse.to(qkv.device)


class OnCuda(Operation):
    device = "cuda"
    tile = 128


class Interpreted(Operation):
    tile = 128

    def __call__(self, qkv: Tensor, n_head: int, p: float = 0.0, seed: int = SEED) -> tuple[Tensor, Tensor]:
        return InterpretedFunction.apply(qkv, n_head, p, torch.tensor(seed))


class InterpretedFunction(torch.autograd.Function):
    """What fused.py registers for CUDA tensors, on CPU tensors."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
        from minigpt2.ops import kernel
        from minigpt2.ops.attention import gpu

        out, lse = gpu.forward(kernel.rows(qkv), n_head, p, seed)
        ctx.n_head, ctx.p = n_head, p
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None, None]:
        from minigpt2.ops import kernel
        from minigpt2.ops.attention import gpu

        qkv, out, lse, seed = ctx.saved_tensors
        rows = kernel.rows
        return gpu.backward(rows(grad_out), rows(qkv), out, lse, ctx.n_head, ctx.p, seed), None, None, None


def no_interpreter() -> str | None:
    """Why Triton's interpreter cannot run the kernels, or None if it can."""
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < TRITON:
        return f"the kernels need Triton {TRITON[0]}.{TRITON[1]}, and this is {version}"
    return None


def operation(name: str) -> Operation:
    """The implementation of that name; skips the test where it cannot run."""
    if name == "interpreter":
        if (reason := no_interpreter()) is not None:
            pytest.skip(reason)
        if os.environ["TRITON_INTERPRET"] != "1":
            pytest.skip("the GPU takes the interpreter's place")
    return {"cpu": Operation, "cuda": OnCuda, "interpreter": Interpreted}[name]()


def repair_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Give Triton's interpreter the products and the rounding that a GPU has.

    It multiplies the bits of bfloat16 as if they were integers, and turns float32 into bfloat16 by cutting off. (Its
    documentation says that it does not support bfloat16.)
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def repaired_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def repaired_cast(self: Any, handle: Any, dtype: Any) -> Any:
        if (handle.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, handle, dtype)
        rounded = torch.from_numpy(np.array(handle.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    patch.setattr(InterpreterBuilder, "create_dot", repaired_dot)
    patch.setattr(InterpreterBuilder, "cast_impl", repaired_cast)
