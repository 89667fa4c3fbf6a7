"""Fused causal attention: one operation forward, one backward, never a T x T matrix.

On the CPU the kernel is C++ (csrc/, built at first use by build.py and called by kernel.py); on CUDA it is Triton
(gpu.py, imported at first use).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from minigpt2.ops import kernel
from minigpt2.ops.attention.steps import kept
from minigpt2.ops.checks import MAX_HEAD_DIM, check_backward, check_decode, check_seed, lse_dtype, packed_sizes
from minigpt2.ops.seed import draw_seed
from minigpt2.torch_private import constant_to_compiler, transformed

CUDA_DTYPES = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}  # and the largest head size
TRITON = (3, 4)  # the first that keeps on disk which tiles it chose

torch.library.define(
    "minigpt2::attention",
    "(Tensor qkv, int n_head, float dropout_p, Tensor? seed, float? scale=None) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "minigpt2::attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int n_head, float dropout_p, Tensor? seed, "
    "float? scale=None) -> Tensor",
)
torch.library.define("minigpt2::decode", "(Tensor q, Tensor k, Tensor v, float? scale=None) -> Tensor")


def unavailable(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the fused kernel cannot serve tensors like these, or None if it can. May build it, or import Triton."""
    return _reason(torch.device(device).type, dtype, head_dim)


@functools.cache
def _reason(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device == "cuda":
        return _cuda_reason(dtype, head_dim)
    if device != "cpu":
        return f"there is no fused kernel for {device} tensors"
    if dtype not in kernel.DTYPES:
        return f"the fused kernel serves float32, bfloat16 and float64, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        return f"the fused kernel serves head sizes that are multiples of 16 up to {MAX_HEAD_DIM}, not {head_dim}"
    return kernel.unavailable()


def _cuda_reason(dtype: torch.dtype, head_dim: int) -> str | None:
    name = str(dtype).removeprefix("torch.")
    if dtype not in CUDA_DTYPES:
        return f"the fused kernel serves float16, bfloat16 and float32 on CUDA, not {name}"
    if head_dim % 16 or not 16 <= head_dim <= CUDA_DTYPES[dtype]:
        limit = f"{name} head sizes that are multiples of 16 up to {CUDA_DTYPES[dtype]}"
        return f"the fused kernel serves {limit} on CUDA, not {head_dim}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return f"the fused kernel needs a CUDA device of capability 8.0, and this is {torch.cuda.get_device_name()}"
    try:
        import triton
    except ImportError:
        return "the fused kernel needs Triton on CUDA: pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < TRITON:
        return f"the fused kernel needs Triton {TRITON[0]}.{TRITON[1]}, and this is {triton.__version__}"
    return None


@constant_to_compiler
def _refuse_unavailable(device: str, dtype: torch.dtype, head_dim: int) -> None:
    reason = _reason(device, dtype, head_dim)
    if reason is not None:
        raise RuntimeError(f"fused attention is not available: {reason}")


def fused_attention(qkv: Tensor, n_head: int, *, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    """Causal multi-head attention. softmax(scale q k^T) v, FlashAttention-2's algorithm (arXiv:2307.08691).

    qkv: (B, T, 3C), the queries, keys and values side by side, C = n_head * D; float32, bfloat16 (sums in float32), on
    the CPU float64, on CUDA float16 (sums in float32); any strides. On CUDA, products of float32 are float32's, or tf32
    where torch's own may be (torch.set_float32_matmul_precision). scale > 0; None stands for 1 / sqrt(D). Returns (B,
    T, C) in the same dtype. Dropout on the probabilities, with dropout_p in [0, 1], draws one seed from torch's default
    generator. Raises RuntimeError where the kernel cannot serve (see `unavailable`), ValueError for bad sizes.
    """
    head_dim = packed_sizes(qkv, n_head)[3]
    _refuse_unavailable(qkv.device.type, qkv.dtype, head_dim)
    if transformed():
        raise RuntimeError(
            "fused attention is unknown to torch.func and to forward-mode differentiation; use attention='eager' there"
        )
    seed = draw_seed(qkv) if dropout_p > 0.0 else None
    if kernel.direct(qkv):
        return kernel.attention(qkv, n_head, dropout_p, seed, scale)[0]
    out: Tensor = torch.ops.minigpt2.attention(qkv, n_head, dropout_p, seed, scale)[0]
    return out


def dropout_mask(seed: int, B: int, H: int, T: int, p: float) -> Tensor:
    """The mask that the kernel applies, True where a probability is kept: (B, H, T, T), bool. See csrc/dropout.h.

    A reference for tests and for other kernels.
    """
    head, places = torch.arange(B * H, device="cpu").view(B, H, 1, 1), torch.arange(T, device="cpu")
    return kept(seed, head, places[:, None], places, p)


def decode(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of one query over a cache, without a mask and without gradients.

    q: (B, H, 1, D); k, v: (B, H, T, D), often views of a longer cache: any strides, but those whose last dimension is
    not contiguous are copied. scale: see fused_attention. Returns (B, H, 1, D). Raises RuntimeError where the kernel
    cannot serve (there is one for the CPU only), ValueError for bad sizes.
    """
    check_decode(q, k, v)
    if not q.is_cpu:
        raise RuntimeError(f"there is no decode kernel for {q.device.type} tensors")
    _refuse_unavailable("cpu", q.dtype, q.shape[-1])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("decode has no gradient; call it under torch.no_grad()")
    if kernel.direct(q, k, v):
        return kernel.decode(q, k, v, scale)
    out: Tensor = torch.ops.minigpt2.decode(q, k, v, scale)
    return out


def _attention_cuda(
    qkv: Tensor, n_head: int, dropout_p: float, seed: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    _refuse_unavailable("cuda", qkv.dtype, packed_sizes(qkv, n_head)[3])
    check_seed(seed, dropout_p, qkv.device)
    from minigpt2.ops.attention import gpu

    return gpu.forward(kernel.rows(qkv), n_head, dropout_p, seed, scale)


def _attention_backward_cuda(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    _refuse_unavailable("cuda", qkv.dtype, packed_sizes(qkv, n_head)[3])
    check_backward(grad_out, qkv, out, lse, n_head)
    check_seed(seed, dropout_p, qkv.device)
    from minigpt2.ops.attention import gpu

    tensors = kernel.rows(grad_out), kernel.rows(qkv), out.contiguous(), lse.contiguous()
    return gpu.backward(*tensors, n_head, dropout_p, seed, scale)


def _attention_fake(
    qkv: Tensor, n_head: int, dropout_p: float, seed: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    B, T, H, D = packed_sizes(qkv, n_head)
    check_seed(seed, dropout_p, qkv.device)
    return qkv.new_empty((B, T, H * D)), qkv.new_empty((B, H, T), dtype=lse_dtype(qkv.dtype))


def _attention_backward_fake(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    check_backward(grad_out, qkv, out, lse, n_head)
    check_seed(seed, dropout_p, qkv.device)
    return qkv.new_empty(qkv.shape)


def _decode_fake(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    check_decode(q, k, v)
    return q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.n_head, ctx.dropout_p, seed, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, seed)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    qkv, out, lse, seed = ctx.saved_tensors
    settings = (ctx.n_head, ctx.dropout_p, seed, ctx.scale)
    return torch.ops.minigpt2.attention_backward(grad_out, qkv, out, lse, *settings), None, None, None, None


def _no_second_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("fused attention has no second derivative; use attention='eager' for that")


torch.library.impl("minigpt2::attention", "CPU", kernel.attention)
torch.library.impl("minigpt2::attention_backward", "CPU", kernel.attention_backward)
torch.library.impl("minigpt2::decode", "CPU", kernel.decode)
torch.library.impl("minigpt2::attention", "CUDA", _attention_cuda)
torch.library.impl("minigpt2::attention_backward", "CUDA", _attention_backward_cuda)
torch.library.register_fake("minigpt2::attention", _attention_fake)
torch.library.register_fake("minigpt2::attention_backward", _attention_backward_fake)
torch.library.register_fake("minigpt2::decode", _decode_fake)
torch.library.register_autograd("minigpt2::attention", _backward, setup_context=_save)
torch.library.register_autograd("minigpt2::attention_backward", _no_second_backward)
