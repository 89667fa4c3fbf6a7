"""What the operations of the kernels may be called with, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "MAX_HEAD_DIM",
    "blocks_fit",
    "check_adamw",
    "check_addend",
    "check_alike",
    "check_backward",
    "check_decode",
    "check_matmul",
    "check_seed",
    "checked_scale",
    "in_memory",
    "lse_dtype",
    "packed_sizes",
]

MAX_HEAD_DIM = 256


def packed_sizes(qkv: Tensor, n_head: int) -> tuple[int, int, int, int]:
    """B, T, H, D of a packed projection; ValueError for one that is none."""
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head):
        raise ValueError(f"qkv must be (B, T, 3C) with C a multiple of n_head = {n_head}, not {tuple(qkv.shape)}")
    B, T, width = qkv.shape
    _check_head_dim(width // 3 // n_head)
    return B, T, n_head, width // 3 // n_head


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores, 1 / sqrt(D) for None; ValueError for one that is not positive and finite."""
    scale = 1 / math.sqrt(head_dim or 1) if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"the scale of attention must be positive and finite, got {scale}")
    return scale


def in_memory(x: Tensor) -> bool:
    """Whether the values of x, a tensor on the CPU, lie in memory as they are, which those of sparse tensors and of
    PyTorch's lazy negatives and lazy zeros do not; and at multiples of their size."""
    if x.layout is not torch.strided or x.is_neg():
        return False
    address = x.data_ptr()
    return (address != 0 or not x.numel()) and address % x.element_size() == 0


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the log-sum-exp of attention: that of the arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_decode(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q is one query for each head of k and v, on their device."""
    fits = q.dim() == k.dim() == v.dim() == 4 and q.shape == (*k.shape[:2], 1, k.shape[3]) and k.shape == v.shape
    if not fits or k.shape[2] < 1:
        raise ValueError(
            f"q must be (B, H, 1, D), k and v (B, H, T, D); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, not {q.device}, {k.device}, {v.device}")
    _check_head_dim(q.shape[3])


def blocks_fit(x: Tensor, tensors: Sequence[Tensor], n_head: int, past: int) -> bool:
    """Whether x (B, 1, C) and, of each block, its parameters in the order of Block.parameters() and its caches of keys
    and values (B, H, room, D) belong together, lie in memory row after row and have room for a token after `past`."""
    if x.dim() != 3 or not tensors or len(tensors) % 14 or tensors[13].dim() != 4:
        return False
    (B, T, C), inner, (_, _, room, head_dim) = x.shape, tensors[9].numel(), tensors[13].shape
    vector, cached, dtype = (C,), (B, n_head, room, head_dim), x.dtype
    attn = (vector, vector, (C, 3 * C), (3 * C,), (C, C), vector)
    mlp = (vector, vector, (C, inner), (inner,), (inner, C), vector)
    shapes = (*attn, *mlp, cached, cached)
    return (
        T == 1
        and dtype in (torch.float32, torch.bfloat16)
        and n_head * head_dim == C
        and head_dim % 16 == 0 < head_dim <= MAX_HEAD_DIM
        and C % 32 == inner % 32 == 0 < inner
        and 0 <= past < room
        and [t.shape for t in tensors] == [*shapes] * (len(tensors) // 14)
        and all(t.dtype is dtype and t.is_contiguous() for t in (x, *tensors))
    )


def check_adamw(p: Tensor, grad: Tensor, first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless weights and gradient are float32 matrices, and both moments of their shape, of one dtype
    of fewer bytes."""
    small = first.dtype if first.dtype in (torch.bfloat16, torch.uint8) else torch.bfloat16
    wanted = [(p, torch.float32), (grad, torch.float32), (first, small), (second, small)]
    if p.dim() != 2 or any(t.shape != p.shape or t.dtype != dtype for t, dtype in wanted):
        found = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t, _ in wanted)
        raise ValueError(
            f"weights and gradient must be float32 matrices, and the moments {small} of their shape: {found}"
        )


def check_matmul(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None, dtype: torch.dtype, add: bool) -> None:
    """Raise ValueError unless a (M, K), b (K, N) and bias (N,) can be multiplied by tiles, and into `out`, if there is
    one, or a tensor of `dtype`; TypeError for other dtypes."""
    sizes = [*a.shape, *b.shape]
    if a.dim() != 2 or b.dim() != 2 or sizes[1] != sizes[2] or (bias is not None and bias.shape != (sizes[3],)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (a, b, bias) if t is not None)
        raise ValueError(f"a (M, K), b (K, N) and bias (N,) do not fit together: {shapes}")
    into = dtype if out is None else out.dtype
    if a.dtype != torch.bfloat16 or not {b.dtype, into} <= {torch.bfloat16, torch.float32}:
        raise TypeError(f"a must be bfloat16, b and the product that or float32, not {a.dtype}, {b.dtype}, {into}")
    if not all(t.is_cpu and t.layout is torch.strided for t in (a, b, bias, out) if t is not None):
        raise ValueError("the kernel takes strided tensors on the CPU")
    if add and (out is None or out.dtype != torch.float32):
        raise ValueError("only to a float32 `out` can a product be added")
    if out is not None and (
        out.shape != (sizes[0], sizes[3]) or not in_memory(out) or (out.numel() and out.stride(1) != 1)
    ):
        raise ValueError(f"out must be ({sizes[0]}, {sizes[3]}), its rows contiguous, not {tuple(out.shape)}")
    if out is not None and out.size(0) > 1 and out.stride(0) < out.size(1):
        raise ValueError(f"out must have rows of their own in memory, not strides {out.stride()}")


def check_addend(a: Tensor, b: Tensor, addend: Tensor | None, into: torch.dtype, alpha: float) -> None:
    """Raise ValueError unless the product a @ b, in the dtype `into`, can be multiplied by alpha and have an addend."""
    if into != torch.bfloat16 and (addend is not None or alpha != 1):
        raise ValueError(f"an addend or alpha is for a product in bfloat16, not in {into}")
    shape = a.size(0), b.size(1)
    if addend is not None and (addend.shape != shape or addend.dtype != torch.bfloat16):
        raise ValueError(f"the addend must be bfloat16 {shape}, not {addend.dtype} {tuple(addend.shape)}")


def check_alike(x: Tensor, other: Tensor | None, name: str) -> None:
    """Raise ValueError unless `other`, if there is one, has the shape, dtype and device of x."""
    if other is not None and (other.shape, other.dtype, other.device) != (x.shape, x.dtype, x.device):
        theirs, ours = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (other, x))
        raise ValueError(f"{name} must be like x, {ours}, not {theirs}")


def check_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int) -> None:
    """Raise ValueError unless the gradient, the output and the log-sum-exp belong to qkv."""
    B, T, H, D = packed_sizes(qkv, n_head)
    if grad_out.shape != (B, T, H * D) or out.shape != grad_out.shape or lse.shape != (B, H, T):
        raise ValueError("the gradient, the output and the log-sum-exp must belong to qkv")
    if not qkv.dtype == grad_out.dtype == out.dtype or lse.dtype != lse_dtype(qkv.dtype):
        raise ValueError("the gradient and the output must have the dtype of qkv")
    if not qkv.device == grad_out.device == out.device == lse.device:
        raise ValueError("the gradient, the output and the log-sum-exp must be on the device of qkv")


def check_seed(seed: Tensor | None, dropout_p: float, device: torch.device) -> None:
    """Raise ValueError where dropout has no seed: one int64, on `device`."""
    if dropout_p and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device):
        raise ValueError("dropout needs a seed: one int64, on the device of what it drops")


def _check_head_dim(D: int) -> None:
    if D % 16 or not 16 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"the head size must be a multiple of 16 up to {MAX_HEAD_DIM}, not {D}")
