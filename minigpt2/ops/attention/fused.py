"""Fused causal attention: one operation forward, one backward, never a T x T matrix.

On the CPU the kernel is C++ (cpu.cpp, built at first use by build.py). It is called through ctypes: a plain C interface
compiles in seconds where torch's own C++ headers take half a minute, and a call costs a few microseconds. On CUDA it is
Triton (gpu.py, imported at first use).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from minigpt2.ops import build
from minigpt2.ops.seed import draw_seed
from minigpt2.torch_private import constant_to_compiler

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
CUDA_DTYPES = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}  # and the largest head size
MAX_HEAD_DIM = 256
TRITON = (3, 4)  # the first that keeps on disk which tiles it chose

torch.library.define(
    "minigpt2::attention", "(Tensor qkv, int n_head, float dropout_p, Tensor? seed) -> (Tensor out, Tensor lse)"
)
torch.library.define(
    "minigpt2::attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int n_head, float dropout_p, Tensor? seed) -> Tensor",
)
torch.library.define("minigpt2::decode", "(Tensor q, Tensor k, Tensor v) -> Tensor")


def unavailable(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the fused kernel cannot serve tensors like these, or None if it can. May build it, or import Triton."""
    return _reason(torch.device(device).type, dtype, head_dim)


@functools.cache
def _reason(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device == "cuda":
        return _cuda_reason(dtype, head_dim)
    if device != "cpu":
        return f"there is no fused kernel for {device} tensors"
    if dtype not in DTYPES:
        return f"the fused kernel serves float32, bfloat16 and float64, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        return f"the fused kernel serves head sizes that are multiples of 16 up to {MAX_HEAD_DIM}, not {head_dim}"
    found = build.kernel()
    return found if isinstance(found, str) else None


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


def fused_attention(qkv: Tensor, n_head: int, *, dropout_p: float = 0.0) -> Tensor:
    """Causal multi-head attention. softmax(q k^T / sqrt(D)) v, FlashAttention's algorithm (arXiv:2205.14135).

    qkv: (B, T, 3C), the queries, keys and values side by side, C = n_head * D; float32, bfloat16 (sums in float32), on
    the CPU float64, on CUDA float16 (sums in float32); any strides. On CUDA, products of float32 are float32's, or tf32
    where torch's own may be (torch.set_float32_matmul_precision). Returns (B, T, C) in the same dtype. Dropout on the
    probabilities, with dropout_p in [0, 1], draws one seed from torch's default generator. Raises RuntimeError where
    the kernel cannot serve (see `unavailable`), ValueError for bad sizes.
    """
    head_dim = _sizes(qkv, n_head)[3]
    _refuse_unavailable(qkv.device.type, qkv.dtype, head_dim)
    seed = draw_seed(qkv) if dropout_p > 0.0 else None
    if qkv.device.type == "cpu" and _plain(qkv):
        return _attention(qkv, n_head, dropout_p, seed)[0]
    out: Tensor = torch.ops.minigpt2.attention(qkv, n_head, dropout_p, seed)[0]
    return out


def dropout_mask(seed: int, B: int, H: int, T: int, p: float) -> Tensor:
    """The mask that the kernel applies, True where a probability is kept: (B, H, T, T), bool. cpu.cpp defines it.

    A reference for tests and for other kernels, in int64 arithmetic cut to 32 bits.
    """
    low = 0xFFFFFFFF

    def times(x: Tensor, constant: int) -> Tensor:  # mod 2^32 without leaving int64
        return (x * (constant & 0xFFFF) + ((x * (constant >> 16) & 0xFFFF) << 16)) & low

    def mix(x: Tensor) -> Tensor:
        x = times(x ^ x >> 16, 0x7FEB352D)
        x = times(x ^ x >> 15, 0x846CA68B)
        return x ^ x >> 16

    head = torch.arange(B * H).view(B, H, 1, 1)
    row, column = torch.arange(T).view(T, 1), torch.arange(T)

    def key(constant: int) -> Tensor:
        first = mix(torch.tensor(((seed & low) + constant) & low)) ^ (seed >> 32 & low)
        return mix(mix((mix(first) + head) & low) ^ row)

    x = (times(column // 32 * 16 + column % 16, 0x9E3779B9) + key(0x9E3779B9)) & low
    x = (times(x ^ x >> 16, 0x7FEB352D) + key(0x85EBCA6B)) & low
    x = times(x ^ x >> 15, 0x846CA68B)
    x = x ^ x >> 16
    return torch.where(column % 32 < 16, x & 0xFFFF, x >> 16) >= int(p * 65536 + 0.5)


def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query over a cache, without a mask and without gradients.

    q: (B, H, 1, D); k, v: (B, H, T, D), often views of a longer cache: any strides but the last, which must be 1.
    Returns (B, H, 1, D). Raises RuntimeError where the kernel cannot serve (there is one for the CPU only), ValueError
    for bad sizes.
    """
    if q.device.type != "cpu":
        raise RuntimeError(f"there is no decode kernel for {q.device.type} tensors")
    _refuse_unavailable(q.device.type, q.dtype, q.shape[-1])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("decode has no gradient; call it under torch.no_grad()")
    if _plain(q, k, v):
        return _decode(q, k, v)
    out: Tensor = torch.ops.minigpt2.decode(q, k, v)
    return out


def _plain(*tensors: Tensor) -> bool:
    """Whether the dispatcher has nothing to add: no tracing, no subclass, no gradient. Passing it by saves 10 us."""
    if torch.compiler.is_compiling() or any(type(x) is not Tensor for x in tensors):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _sizes(qkv: Tensor, n_head: int) -> tuple[int, int, int, int]:
    """B, T, H, D."""
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head):
        raise ValueError(f"qkv must be (B, T, 3C) with C a multiple of n_head = {n_head}, not {tuple(qkv.shape)}")
    B, T, width = qkv.shape
    return B, T, n_head, width // 3 // n_head


def _kernel(like: Tensor, head_dim: int) -> Any:
    _refuse_unavailable("cpu", like.dtype, head_dim)
    return build.kernel()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(status: int) -> None:
    if status:
        raise MemoryError("fused attention could not allocate its scratch memory")


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_seed(seed: Tensor | None, dropout_p: float, device: torch.device) -> None:
    if dropout_p and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device):
        raise ValueError("dropout needs a seed: one int64, on the device of qkv")


def _seed_pointer(seed: Tensor | None, dropout_p: float) -> int | None:
    return None if seed is None or dropout_p == 0.0 else seed.data_ptr()


def _check_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int) -> None:
    B, T, H, D = _sizes(qkv, n_head)
    if grad_out.shape != (B, T, H * D) or out.shape != grad_out.shape or lse.shape != (B, H, T):
        raise ValueError("the gradient, the output and the log-sum-exp must belong to qkv")
    if not qkv.dtype == grad_out.dtype == out.dtype or lse.dtype != _lse_dtype(qkv.dtype):
        raise ValueError("the gradient and the output must have the dtype of qkv")


def _attention(qkv: Tensor, n_head: int, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, H, D = _sizes(qkv, n_head)
    kernel = _kernel(qkv, D)
    _check_seed(seed, dropout_p, qkv.device)
    qkv = _rows(qkv)
    out, lse = qkv.new_empty((B, T, H * D)), torch.empty((B, H, T), dtype=_lse_dtype(qkv.dtype))
    batch, row, _ = qkv.stride()
    _check(kernel.minigpt2_attention(DTYPES[qkv.dtype], B, T, H, D, qkv.data_ptr(), batch, row, out.data_ptr(),
                                     lse.data_ptr(), dropout_p, _seed_pointer(seed, dropout_p)))  # fmt: skip
    return out, lse


def _attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    B, T, H, D = _sizes(qkv, n_head)
    kernel = _kernel(qkv, D)
    _check_backward(grad_out, qkv, out, lse, n_head)
    _check_seed(seed, dropout_p, qkv.device)
    qkv, grad_out, out, lse = _rows(qkv), _rows(grad_out), out.contiguous(), lse.contiguous()
    grad_qkv = torch.empty((B, T, 3 * H * D), dtype=qkv.dtype)
    _check(kernel.minigpt2_attention_backward(
        DTYPES[qkv.dtype], B, T, H, D, qkv.data_ptr(), *qkv.stride()[:2], grad_out.data_ptr(), *grad_out.stride()[:2],
        out.data_ptr(), lse.data_ptr(), grad_qkv.data_ptr(), dropout_p, _seed_pointer(seed, dropout_p)))  # fmt: skip
    return grad_qkv


def _attention_cuda(qkv: Tensor, n_head: int, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    _refuse_unavailable("cuda", qkv.dtype, _sizes(qkv, n_head)[3])
    _check_seed(seed, dropout_p, qkv.device)
    from minigpt2.ops.attention import gpu

    return gpu.forward(_rows(qkv), n_head, dropout_p, seed)


def _attention_backward_cuda(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    _refuse_unavailable("cuda", qkv.dtype, _sizes(qkv, n_head)[3])
    _check_backward(grad_out, qkv, out, lse, n_head)
    _check_seed(seed, dropout_p, qkv.device)
    from minigpt2.ops.attention import gpu

    tensors = _rows(grad_out), _rows(qkv), out.contiguous(), lse.contiguous()
    return gpu.backward(*tensors, n_head, dropout_p, seed)


def _decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, H, one, D = q.shape
    T = k.shape[2]
    if one != 1 or k.shape != v.shape or k.shape != (B, H, T, D) or not q.dtype == k.dtype == v.dtype or T < 1:
        raise ValueError(f"q must be (B, H, 1, D), k and v (B, H, T, D); got {tuple(q.shape)}, {tuple(k.shape)}")
    kernel = _kernel(q, D)
    qs, ks, vs = q.stride(), k.stride(), v.stride()
    if not qs[3] == ks[3] == vs[3] == 1:
        raise ValueError("the last dimension of q, k and v must be contiguous")
    out = torch.empty((B, H, 1, D), dtype=q.dtype)
    _check(kernel.minigpt2_decode(DTYPES[q.dtype], B, T, H, D, q.data_ptr(), qs[0], qs[1], k.data_ptr(), ks[0], ks[1],
                                  ks[2], v.data_ptr(), vs[0], vs[1], vs[2], out.data_ptr()))  # fmt: skip
    return out


def _attention_fake(qkv: Tensor, n_head: int, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, H, D = _sizes(qkv, n_head)
    return qkv.new_empty((B, T, H * D)), qkv.new_empty((B, H, T), dtype=_lse_dtype(qkv.dtype))


def _attention_backward_fake(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _decode_fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.n_head, ctx.dropout_p, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, seed)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None, None]:
    qkv, out, lse, seed = ctx.saved_tensors
    grad = torch.ops.minigpt2.attention_backward(grad_out, qkv, out, lse, ctx.n_head, ctx.dropout_p, seed)
    return grad, None, None, None


def _no_second_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("fused attention has no second derivative; use attention='eager' for that")


torch.library.impl("minigpt2::attention", "CPU", _attention)
torch.library.impl("minigpt2::attention_backward", "CPU", _attention_backward)
torch.library.impl("minigpt2::decode", "CPU", _decode)
torch.library.impl("minigpt2::attention", "CUDA", _attention_cuda)
torch.library.impl("minigpt2::attention_backward", "CUDA", _attention_backward_cuda)
torch.library.register_fake("minigpt2::attention", _attention_fake)
torch.library.register_fake("minigpt2::attention_backward", _attention_backward_fake)
torch.library.register_fake("minigpt2::decode", _decode_fake)
torch.library.register_autograd("minigpt2::attention", _backward, setup_context=_save)
torch.library.register_autograd("minigpt2::attention_backward", _no_second_backward)
