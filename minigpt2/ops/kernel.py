"""The compiled kernel's functions, as calls that take tensors and cannot touch memory that is not theirs.

Nothing else in the package calls compiled code. Each function here checks what it is given, in dtype, device, layout
and sizes, and makes its outputs from its inputs, whatever PyTorch's default dtype and device are.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt2.ops import build
from minigpt2.ops.checks import (
    blocks_fit,
    check_adamw,
    check_addend,
    check_alike,
    check_backward,
    check_decode,
    check_matmul,
    check_seed,
    checked_scale,
    in_memory,
    lse_dtype,
    packed_sizes,
)
from minigpt2.torch_private import constant_to_compiler, untouched

__all__ = [
    "DTYPES",
    "FEW",
    "Blocks",
    "adamw",
    "adamw_blocks",
    "attention",
    "attention_backward",
    "bfloat16_products",
    "column_sums",
    "cross_entropy_",
    "decode",
    "decode_blocks",
    "direct",
    "dropout_add",
    "few_rows",
    "few_rows_as_they_are",
    "gelu",
    "in_memory",
    "matmul",
    "serves",
    "serves_blocks",
    "tiles",
    "unavailable",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
FEW = 8
"""The most rows of `few_rows`."""
ADAMW_BLOCK = 64
"""Elements of a row that have one scale in `adamw`."""

_SOURCES = tuple(sorted(path.name for path in build.CSRC.glob("[a-z]*.cpp") if path.stem != "allocator"))


@functools.cache
def unavailable() -> str | None:
    """Why there is no compiled kernel here, or None if there is one. The first call on a machine compiles it."""
    found = build.library("kernel", _SOURCES)
    return found if isinstance(found, str) else None


def serves(x: Tensor) -> bool:
    """Whether there is a kernel for tensors of this device, layout and dtype."""
    return x.is_cpu and x.layout is torch.strided and _serves(x.dtype)


@constant_to_compiler
def _serves(dtype: torch.dtype) -> bool:
    return dtype in DTYPES and unavailable() is None


def direct(*tensors: Tensor) -> bool:
    """Whether PyTorch's dispatcher has nothing to add to a function of these. Passing it by saves 10 us."""
    if not untouched(*tensors) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    return all(t.is_cpu and in_memory(t) for t in tensors)


def attention(
    qkv: Tensor, n_head: int, dropout_p: float, seed: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention: qkv (B, T, 3C) -> (B, T, C), and the log-sum-exp (B, H, T) in the dtype of the arithmetic.
    scale: the factor of the scores, > 0; None stands for 1 / sqrt(D)."""
    B, T, H, D = packed_sizes(qkv, n_head)
    qkv = rows(_checked(qkv)[0])
    out = qkv.new_empty((B, T, H * D))
    lse = qkv.new_empty((B, H, T), dtype=lse_dtype(qkv.dtype))
    strides = qkv.stride()[:2]
    inputs = (B, T, H, D, qkv.data_ptr(), *strides, checked_scale(scale, D))
    _call("attention", qkv.dtype, *inputs, out.data_ptr(), lse.data_ptr(), *_seed(seed, dropout_p))
    return out, lse


def attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """The gradient of `attention` with respect to qkv, (B, T, 3C)."""
    B, T, H, D = packed_sizes(qkv, n_head)
    check_backward(grad_out, qkv, out, lse, n_head)
    (qkv, grad_out, out), (lse,) = _checked(qkv, grad_out, out), _checked(lse)
    qkv, grad_out, out, lse = rows(qkv), rows(grad_out), out.contiguous(), lse.contiguous()
    grad_qkv = qkv.new_empty((B, T, 3 * H * D))
    inputs = (qkv.data_ptr(), *qkv.stride()[:2], checked_scale(scale, D))
    gradient = (grad_out.data_ptr(), *grad_out.stride()[:2], out.data_ptr())
    outputs = (lse.data_ptr(), grad_qkv.data_ptr(), *_seed(seed, dropout_p))
    _call("attention_backward", qkv.dtype, B, T, H, D, *inputs, *gradient, *outputs)
    return grad_qkv


def bfloat16_products() -> str:
    """What `attention` multiplies bfloat16 with here: float32, avx512_bf16, or amx_bf16, which serves heads
    of a multiple of 32 numbers."""
    names = ("float32", "avx512_bf16", "amx_bf16")
    return names[_functions()["bfloat16_products"]()]


def decode(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of one query over a cache: q (B, H, 1, D), k and v (B, H, T, D) -> (B, H, 1, D)."""
    check_decode(q, k, v)
    B, H, T, D = k.shape
    q, k, v = map(rows, _checked(q, k, v))
    out = q.new_empty((B, H, 1, D))
    cached = (k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3])
    query = (checked_scale(scale, D), q.data_ptr(), *q.stride()[:2])
    _call("decode", q.dtype, B, T, H, D, *query, *cached, out.data_ptr())
    return out


def serves_blocks(x: Tensor, tensors: Sequence[Tensor], n_head: int, past: int) -> bool:
    """Whether these are what `decode_blocks` takes, where the kernel serves x."""
    return direct(x, *tensors) and blocks_fit(x, tensors, n_head, past) and 0 < x.size(0) <= FEW


class Blocks:
    """What `decode_blocks` reads, laid out once. `tensors` are, block after block, its parameters in the order of
    Block.parameters() and its caches of keys and values (B, H, room, D), and nobody else's; `numbers` the scale of its
    scores and the eps of its two LayerNorms. The caller has asked `serves_blocks`."""

    def __init__(self, tensors: Sequence[Tensor], n_head: int, numbers: Sequence[tuple[float, float, float]]) -> None:
        self.tensors, (self.B, _, self.room, D) = tensors, tensors[-1].shape
        self.addresses = [t.data_ptr() for t in tensors]
        constants = [number for scale, *eps in numbers for number in (checked_scale(scale, D), *eps)]
        arrays = (ctypes.c_void_p * len(tensors))(*self.addresses), (ctypes.c_double * len(constants))(*constants)
        self.arguments = (n_head, D, tensors[9].size(0), self.room, len(numbers), *arrays)

    def serve(self, x: Tensor, past: int) -> bool:
        """Whether this is another token of what they were laid out for, and they lie where they lay."""
        like, shape = self.tensors[-1], (self.B, 1, self.tensors[0].size(0))
        fits = direct(x) and past < self.room and x.shape == shape and x.dtype is like.dtype and x.is_contiguous()
        return fits and [t.data_ptr() for t in self.tensors] == self.addresses


def decode_blocks(x: Tensor, blocks: Blocks, past: int) -> Tensor:
    """One more token through blocks: x (B, 1, C) -> (B, 1, C). Its keys and values are written behind the first `past`
    of the caches. The caller has asked `serves_blocks`, or `blocks.serve` if nothing has changed since."""
    out = torch.empty_like(x)
    _call("decode_blocks", x.dtype, blocks.B, past + 1, *blocks.arguments, x.data_ptr(), out.data_ptr())
    return out


def dropout_add(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    """residual + dropout(x), or dropout(x) alone; any shape, the mask being that of rows of the last dimension."""
    check_alike(x, residual, "residual")
    x, residual = _contiguous(x, residual)
    out = torch.empty_like(x)
    width = x.size(-1) if x.dim() else 1
    addresses = (x.data_ptr(), None if residual is None else residual.data_ptr(), out.data_ptr())
    _call("dropout_add", x.dtype, x.numel() // max(1, width), width, *addresses, *_seed(seed, p))
    return out


def gelu(x: Tensor, grad: Tensor | None = None) -> Tensor:
    """The tanh GELU of x, of any shape; or, with the gradient of its result, that of x."""
    check_alike(x, grad, "the gradient")
    x, grad = _contiguous(x, grad)
    out = torch.empty_like(x)
    _call("gelu", x.dtype, x.numel(), x.data_ptr(), None if grad is None else grad.data_ptr(), out.data_ptr())
    return out


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight + bias for weight (K, N) and N a multiple of 32; without a bias x @ weight^T for weight (N, K) and K a
    multiple of 16. x (M, K), M from 1 to FEW; all of one dtype, and the sums of bfloat16 in float32."""
    sizes = (*x.shape, *(weight.shape if bias is not None else weight.shape[::-1]))
    M, K, inner, N = sizes if len(sizes) == 4 else (0, 0, 0, 0)
    if not 1 <= M <= FEW or inner != K or K < 1 or (N % 32 if bias is not None else K % 16):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are no product of few rows")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be ({N},), got {tuple(bias.shape)}")
    weight, bias = _contiguous(weight, bias)
    return few_rows_as_they_are(rows(_checked(x, weight)[0]), weight, bias)


def few_rows_as_they_are(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`few_rows` of tensors that are known to be what it takes, and plain: what calls it has asked."""
    (M, K), N = x.shape, weight.size(0 if bias is None else 1)
    out = x.new_empty((M, N))
    addresses = (weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
    _call("few_rows", x.dtype, M, K, N, x.data_ptr(), x.stride(0), *addresses)
    return out


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    add: bool = False,
    addend: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """alpha a @ b, and a bias if there is one, on AMX: a (M, K), bfloat16, b (K, N), bfloat16 or float32, which is
    rounded to bfloat16, bias (N,) -> (M, N), float32 or rounded to bfloat16: in dtype, or in `out`, to which it can be
    added if that is float32. An alpha other than 1, and an addend (M, N), bfloat16, of which beta times is added, are
    for a product in bfloat16. Sums are float32. Raises RuntimeError where there is no AMX."""
    if not tiles():
        raise RuntimeError("this processor has no AMX, or the kernel was not compiled for it")
    check_matmul(a, b, bias, out, dtype, add)
    check_addend(a, b, addend, dtype if out is None else out.dtype, alpha)
    (M, K), N = a.shape, b.size(1)
    out = a.new_empty((M, N), dtype=dtype) if out is None else out
    if not K:
        a, b = a.new_zeros((M, 1)), b.new_zeros((1, N))
    a, b = (t if 1 in t.stride() and in_memory(t) else t.clone(memory_format=torch.contiguous_format) for t in (a, b))
    bias = None if bias is None else bias.detach().float().clone(memory_format=torch.contiguous_format)
    addend = None if addend is None or not beta else rows(_checked(addend)[0])
    left, right = ((t.data_ptr(), t.stride(turned), turned) for t in (a, b) for turned in [int(t.stride(1) != 1)])
    beside = (None, 0) if addend is None else (addend.data_ptr(), addend.stride(0))
    places = (None if bias is None else bias.data_ptr(), *beside, alpha, beta, out.data_ptr(), out.stride(0))
    wide, exact = (t.dtype is torch.float32 for t in (b, out))
    if out.numel() and _functions()["matmul"](M, N, max(1, K), *left, *right, wide, *places, exact, add):
        raise MemoryError("matmul could not allocate its scratch memory")
    return out


def column_sums(x: Tensor) -> Tensor:
    """The sums over the rows of x (n, m): (m,), in the dtype of the arithmetic."""
    if x.dim() != 2:
        raise ValueError(f"x must be a matrix, not {tuple(x.shape)}")
    x = rows(_checked(x)[0])
    out = x.new_empty(x.size(1), dtype=lse_dtype(x.dtype))
    _call("column_sums", x.dtype, *x.shape, x.data_ptr(), x.stride(0), out.data_ptr())
    return out


@functools.cache
def tiles() -> bool:
    """Whether there is `matmul` here."""
    return unavailable() is None and bool(_functions()["multiplies_by_tiles"]())


def adamw_blocks(columns: int) -> int:
    """How many scales `adamw` has for a row of so many elements."""
    return -(-columns // ADAMW_BLOCK)


def adamw(
    p: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    numbers: tuple[float, ...],
    seed: int,
    first_row: int,
) -> None:
    """The step of ../ops/adamw.py, in place, of p and grad (rows, columns), float32, both contiguous; the moments
    bfloat16 or, with scales in float32, one for each block of a row, uint8."""
    check_adamw(p, grad, first, second)
    scaled = list(scales or ())
    blocks = adamw_blocks(p.size(1))
    if any(s.shape != (p.size(0), blocks) or s.dtype != torch.float32 for s in scaled):
        raise ValueError(f"scales must be float32 ({p.size(0)}, {blocks})")
    if first.dtype is not (torch.uint8 if scaled else torch.bfloat16):
        raise ValueError(f"the moments must be uint8 with scales and bfloat16 without, not {first.dtype}")
    tensors = [p, grad, first, second, *scaled]
    if not all(t.is_cpu and t.is_contiguous() and in_memory(t) for t in tensors):
        raise ValueError("weights, gradient, moments and scales must be contiguous, on the CPU")
    if not p.numel():
        return
    places = [t.data_ptr() for t in tensors] + [None] * (2 - len(scaled))
    constants = (ctypes.c_double * 7)(*numbers)
    sizes = (1 if scaled else 2, *p.shape)
    if _functions()["adamw"](*sizes, *places, constants, seed & 0xFFFFFFFF, first_row):
        raise MemoryError("adamw could not allocate its scratch memory")


def cross_entropy_(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
    """The cross-entropy of each row of logits (n, V), its last dimension contiguous, with its label in [0, V), int64
    (n,): (n,), in the dtype of the arithmetic. With `gradient` the logits become theirs: softmax less one-hot."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not logits.size(1):
        raise ValueError(f"logits (n, V) and labels (n,) do not fit: {tuple(logits.shape)}, {tuple(labels.shape)}")
    if labels.dtype != torch.int64 or not labels.is_cpu or not in_memory(labels):
        raise ValueError(f"labels must be int64 on the CPU, not {labels.dtype} on {labels.device}")
    V = logits.size(1)
    if labels.numel() and not 0 <= labels.min() <= labels.max() < V:
        raise ValueError(f"labels must be in [0, {V}), not from {labels.min()} to {labels.max()}")
    # It is written in place, so that there is no copy to take instead.
    if _checked(logits)[0] is not logits or (logits.numel() and (logits.stride(1) != 1 or logits.stride(0) < V)):
        raise ValueError(f"logits must have rows of their own in memory, not strides {logits.stride()}")
    labels = labels.contiguous()
    losses = logits.new_empty(labels.shape, dtype=lse_dtype(logits.dtype))
    addresses = (logits.data_ptr(), logits.stride(0), labels.data_ptr(), losses.data_ptr())
    _call("cross_entropy", logits.dtype, *logits.shape, *addresses, gradient)
    return losses


def _checked(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, whose memory compiled code can read: on the CPU, in one dtype. Raises ValueError for others."""
    for t in tensors:
        if not t.is_cpu or t.layout is not torch.strided or t.dtype not in DTYPES:
            what = f"{t.dtype} ones on {t.device}" if t.layout is torch.strided else f"{t.layout} ones"
            raise ValueError(f"the kernel takes float32, bfloat16 or float64 tensors on the CPU, not {what}")
        if t.dtype is not tensors[0].dtype:
            raise ValueError(f"the tensors must have one dtype, not {', '.join(str(t.dtype) for t in tensors)}")
    if not all(map(in_memory, tensors)):
        tensors = tuple(t.clone() for t in tensors)
    return tensors


def _contiguous(x: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if other is None:
        return _checked(x)[0].contiguous(), None
    x, other = _checked(x, other)
    return x.contiguous(), other.contiguous()


def rows(x: Tensor) -> Tensor:
    """x, or a copy of it, with its last dimension contiguous."""
    return x if x.stride(-1) == 1 or not x.numel() else x.contiguous()


def _seed(seed: Tensor | None, p: float) -> tuple[float, int | None]:
    if not 0 <= p <= 1:
        raise ValueError(f"the dropout probability must be in [0, 1], got {p}")
    check_seed(seed, p, torch.device("cpu"))
    return p, None if seed is None or not p else seed.data_ptr()


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    if _functions()[name](DTYPES[dtype], *arguments):
        raise MemoryError(f"{name} could not allocate its scratch memory")


@functools.cache
def _functions() -> dict[str, Any]:
    library = build.library("kernel", _SOURCES)
    if isinstance(library, str):
        raise RuntimeError(f"the compiled kernel is not available: {library}")
    integer, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    dropout = [number, pointer]  # the probability and the seed
    shape: list[Any] = [ctypes.c_int, *[integer] * 4]  # dtype, B, T, H, D
    strided: list[Any] = [pointer, integer, integer]
    cached = [*strided, integer]
    matrix: list[Any] = [pointer, integer, ctypes.c_int]  # and whether it is turned
    beside: list[Any] = [pointer, pointer, integer, number, number]  # bias, addend and its stride, alpha, beta
    arguments = {
        # bytes of a moment, rows, columns, ..., the numbers of the step, seed and first row
        "adamw": [ctypes.c_int, integer, integer, *[pointer] * 7, ctypes.c_uint32, integer],
        "attention": [*shape, *strided, number, pointer, pointer, *dropout],
        "attention_backward": [*shape, *strided, number, *strided, *[pointer] * 3, *dropout],
        "bfloat16_products": [],
        "column_sums": [ctypes.c_int, integer, integer, pointer, integer, pointer],
        "cross_entropy": [ctypes.c_int, *[integer] * 2, pointer, integer, pointer, pointer, ctypes.c_int],
        "decode": [*shape, number, *strided, *cached, *cached, pointer],
        "decode_blocks": [*shape, *[integer] * 3, *[pointer] * 4],
        "dropout_add": [ctypes.c_int, integer, integer, *[pointer] * 3, *dropout],
        "gelu": [ctypes.c_int, integer, *[pointer] * 3],
        "few_rows": [ctypes.c_int, *[integer] * 3, pointer, integer, *[pointer] * 3],  # dtype, M, K, N, ...
        "matmul": [*[integer] * 3, *matrix, *matrix, ctypes.c_int, *beside, pointer, integer, *[ctypes.c_int] * 2],
        "multiplies_by_tiles": [],
    }
    found = {name: getattr(library, f"minigpt2_{name}") for name in arguments}
    for name, function in found.items():
        function.argtypes, function.restype = arguments[name], ctypes.c_int
    return found
