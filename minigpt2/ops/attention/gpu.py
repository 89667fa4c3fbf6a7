"""Causal multi-head attention on the GPU, in Triton: csrc/attention.cpp's operation, with its dropout mask bit for bit.

The method is FlashAttention-2 (Dao 2023, arXiv:2307.08691). For one head, with S = scale * Q K^T:
  forward:    a program has one block of query rows; for each tile of keys on or below the diagonal:
                m' <- max(m, rowmax S);  P <- exp(S - m');  c <- exp(m - m')
                l <- c l + rowsum P;  O <- c O + dropout(P) V;  m <- m'
              out = O / l, and lse = m + log l is all that the backward pass needs to rebuild P.
  delta:      a program has one block of query rows, of which it finds delta <- rowsum(dOut * out)
  queries:    a program has one block of query rows; for each tile of keys:
                P <- exp(S - lse);  dP <- dropout(dOut V^T);  dQ += P (dP - delta) K
  keys:       a program has one block of keys; for each tile of query rows on or below the diagonal, P and dP as above:
                dV += dropout(P)^T dOut;  dK += (P (dP - delta))^T Q
Every result has one writer, which adds in a fixed order: no atomics, so a run repeats bit for bit as long as the tile
sizes are the same. They are chosen by timing, once for each kind of shape, and the choice is kept in Triton's cache.

q, k and v are read where the projection left them, in the packed (B, T, 3C) tensor. Rows past the end of a sequence
repeat its last row: nothing is out of bounds, and what they add is 0 or never stored. Exponentials are to base 2,
because that is the instruction; a factor of log2(e) is part of the scale. Sums are float32.

One thing is not as on the CPU. A product on the diagonal multiplies masked pairs by 0, and 0 * NaN is NaN: what is not
finite may reach rows of its own tile that do not see it, but none before that tile. (To clear it out of the operands
was tried: it takes so many registers that fewer programs fit on a GPU at a time.)

This module imports Triton; fused.py imports this module when the first CUDA tensor comes.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minigpt2.ops.kernel import checked_scale


class Tiles(NamedTuple):
    """A way to cut the work of one kernel: query rows and keys of a tile, and what a program of it runs with."""

    rows: int
    keys: int  # a multiple of 32, the period of the dropout mask
    warps: int
    stages: int  # tiles under way from memory at a time


# What is tried, by kernel, bytes of an element and head size (the next power of two, from 64 on). A program's sums and
# scores must fit in its threads' registers, 255 each, or they spill to memory; and its tiles in shared memory, or it
# does not start: 99 KiB on capability 8.6, 8.9 and 12.0, 163 on 8.0, and 227 on 9.0, where operands lie there that are
# in registers elsewhere. tests/attention/compile_for_gpus.py checks. float32 has small tiles: without tf32 it cannot
# use the matrix units, and products take more registers.
TILES = {
    ("forward", 2, 64): [Tiles(128, 64, 8, 3), Tiles(128, 64, 4, 3), Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 3)],
    ("forward", 2, 128): [Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)],
    ("forward", 2, 256): [Tiles(64, 32, 8, 2)],
    ("forward", 4, 64): [Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2)],
    ("forward", 4, 128): [Tiles(16, 32, 8, 1)],
    ("delta", 2, 64): [Tiles(32, 32, 4, 1)],
    ("delta", 2, 128): [Tiles(32, 32, 4, 1)],
    ("delta", 2, 256): [Tiles(32, 32, 8, 1)],
    ("delta", 4, 64): [Tiles(32, 32, 4, 1)],
    ("delta", 4, 128): [Tiles(32, 32, 16, 1)],
    ("queries", 2, 64): [Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 3)],
    ("queries", 2, 128): [Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(128, 32, 8, 2)],
    ("queries", 2, 256): [Tiles(32, 32, 8, 1)],
    ("queries", 4, 64): [Tiles(32, 32, 8, 1)],
    ("queries", 4, 128): [Tiles(32, 32, 16, 1)],
    ("keys", 2, 64): [Tiles(64, 64, 4, 2), Tiles(64, 128, 8, 2), Tiles(32, 64, 4, 3)],
    ("keys", 2, 128): [Tiles(32, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 2)],
    ("keys", 2, 256): [Tiles(32, 32, 8, 1)],
    ("keys", 4, 64): [Tiles(32, 32, 8, 1), Tiles(64, 32, 8, 1)],
    ("keys", 4, 128): [Tiles(16, 32, 8, 1)],
}

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's: unlike -inf, it can be subtracted from itself


# Dropout: the mask that csrc/dropout.h defines.


@triton.jit
def mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_key(seed, constant: tl.constexpr, head, rows):
    """The key of each row, uint32; seed is an int64."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return mix(mix(mix(mix(low + constant) ^ high) + head.to(tl.uint32)) ^ rows.to(tl.uint32))


@triton.jit
def kept(first, columns, key0, key1, threshold):
    """Whether the pairs of rows (given by their keys) and columns first + columns are kept; first a multiple of 32."""
    # Written so, the compiler sees that columns 16 apart share a word, and computes it once where a thread has both.
    word = (first // 2 + columns // 32 * 16 + columns % 16).to(tl.uint32)
    x = word * 0x9E3779B9 + key0
    x ^= x >> 16
    x = x * 0x7FEB352D + key1
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return tl.where(columns % 32 < 16, x & 0xFFFF, x >> 16) >= threshold.to(tl.uint32)


# Tiles.


@triton.jit
def load_tile(head, stride, rows, T, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) of one head: its HEAD_DIM columns, then zeros."""
    columns = tl.arange(0, WIDTH)
    pointers = head + (tl.minimum(rows, T - 1).to(tl.int64) * stride)[:, None] + columns[None, :]
    return tl.load(pointers) if HEAD_DIM == WIDTH else tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def store_tile(head, stride, rows, T, tile, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    pointers = head + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    inside = (rows < T)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(head.dtype.element_ty), mask=inside)


@triton.jit
def exp2_negative(x):
    """2^x for x that is at most 0 but for rounding, which at scores of 1e9 is no small thing. NaN stays NaN."""
    return tl.exp2(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


# Forward.


@triton.jit
def forward_tiles(
    total, top, sums, q, rows, k_head, v_head, stride, begin, end, T, scale, key0, key1, threshold,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """One block of query rows against the keys from begin to end. With EDGE, keys may lie above the diagonal."""
    for first in range(begin, end, KEYS):
        columns = tl.arange(0, KEYS)
        k = load_tile(k_head, stride, first + columns, T, HEAD_DIM, WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if EDGE:
            s = tl.where(rows[:, None] >= first + columns[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = exp2_negative(s - higher[:, None])
        factor = tl.exp2(top - higher)
        sums = sums * factor + tl.sum(p, axis=1)
        total = total * factor[:, None]
        top = higher
        if DROPOUT:
            p = tl.where(kept(first, columns[None, :], key0[:, None], key1[:, None], threshold), p, 0.0)
        v = load_tile(v_head, stride, first + columns, T, HEAD_DIM, WIDTH)
        total = tl.dot(p.to(v.dtype), v, total, input_precision=PRECISION)
    return total, top, sums


@triton.jit(do_not_specialize=["T", "H", "threshold"])
def forward_kernel(
    qkv, out, lse, seed, stride_batch, stride_row, T, H, scale, threshold, keep_scale, LENGTH,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // blocks
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * ROWS  # the longest first
    rows = first_row + tl.arange(0, ROWS)
    q_head = qkv + (head // H).to(tl.int64) * stride_batch + head % H * HEAD_DIM
    k_head, v_head = q_head + H * HEAD_DIM, q_head + 2 * H * HEAD_DIM

    key0, key1 = rows, rows
    if DROPOUT:
        key0 = row_key(tl.load(seed), 0x9E3779B9, head, rows)
        key1 = row_key(tl.load(seed), 0x85EBCA6B, head, rows)
    q = load_tile(q_head, stride_row, rows, T, HEAD_DIM, WIDTH)
    total = tl.full((ROWS, WIDTH), 0.0, tl.float32)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    sums = tl.full((ROWS,), 0.0, tl.float32)
    edge = first_row // KEYS * KEYS
    end = tl.minimum(first_row + ROWS, T)
    scale *= LOG2_E
    total, top, sums = forward_tiles(
        total, top, sums, q, rows, k_head, v_head, stride_row, 0, edge, T, scale, key0, key1, threshold,
        HEAD_DIM, WIDTH, KEYS, DROPOUT, PRECISION, False)  # fmt: skip
    total, top, sums = forward_tiles(
        total, top, sums, q, rows, k_head, v_head, stride_row, edge, end, T, scale, key0, key1, threshold,
        HEAD_DIM, WIDTH, KEYS, DROPOUT, PRECISION, True)  # fmt: skip

    total = total * (keep_scale / sums)[:, None]
    out_head = out + (head // H).to(tl.int64) * T * H * HEAD_DIM + head % H * HEAD_DIM
    store_tile(out_head, H * HEAD_DIM, rows, T, total, HEAD_DIM, WIDTH)
    tl.store(lse + head.to(tl.int64) * T + rows, (top + tl.log2(sums)) * LN_2, mask=rows < T)


# Backward.


@triton.jit(do_not_specialize=["T", "H", "threshold"])
def delta_kernel(
    qkv, grad_out, out, lse, delta, seed, stride_batch, stride_row, grad_stride_batch, grad_stride_row,
    T, H, scale, threshold, keep_scale, LENGTH,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """delta, for the other two kernels."""
    tl.static_assert(ROWS == KEYS)
    blocks = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // blocks
    first_row = tl.program_id(0) % blocks * ROWS
    rows = first_row + tl.arange(0, ROWS)
    batch, column = (head // H).to(tl.int64), head % H * HEAD_DIM
    grad = load_tile(grad_out + batch * grad_stride_batch + column, grad_stride_row, rows, T, HEAD_DIM, WIDTH)
    y = load_tile(out + batch * T * H * HEAD_DIM + column, H * HEAD_DIM, rows, T, HEAD_DIM, WIDTH)
    row_delta = tl.sum(grad.to(tl.float32) * y.to(tl.float32), axis=1)
    if first_row == 0:
        # All keys of these rows are in one tile, so delta can be had as rowsum(P dP): from P and dP as they are, not
        # from the output as it was rounded. Where a row sees a key or two, nearly all of dP - delta cancels; and that
        # P (dP - delta) sums to 0 must hold for P as it was rounded, whose sum is not quite 1.
        q_head = qkv + batch * stride_batch + column
        q = load_tile(q_head, stride_row, rows, T, HEAD_DIM, WIDTH)
        k = load_tile(q_head + H * HEAD_DIM, stride_row, rows, T, HEAD_DIM, WIDTH)
        v = load_tile(q_head + 2 * H * HEAD_DIM, stride_row, rows, T, HEAD_DIM, WIDTH)
        row_lse = tl.load(lse + head.to(tl.int64) * T + tl.minimum(rows, T - 1)) * LOG2_E
        p = exp2_negative(tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E) - row_lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            key0 = row_key(tl.load(seed), 0x9E3779B9, head, rows)
            key1 = row_key(tl.load(seed), 0x85EBCA6B, head, rows)
            keep = kept(0, tl.arange(0, KEYS)[None, :], key0[:, None], key1[:, None], threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        p = tl.where(rows[:, None] >= rows[None, :], p, 0.0)
        row_delta, total = tl.sum(tl.where(p > 0.0, p * dp, p), axis=1), tl.sum(p, axis=1)
        row_delta = tl.where(total > 0.0, row_delta / total, row_delta)
    tl.store(delta + head.to(tl.int64) * T + rows, row_delta, mask=rows < T)


@triton.jit
def query_tiles(
    dq, q, grad, lse, delta, rows, k_head, v_head, stride, begin, end, T, scale, key0, key1, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of query rows from the keys from begin to end."""
    for first in range(begin, end, KEYS):
        columns = tl.arange(0, KEYS)
        k = load_tile(k_head, stride, first + columns, T, HEAD_DIM, WIDTH)
        v = load_tile(v_head, stride, first + columns, T, HEAD_DIM, WIDTH)
        p = exp2_negative(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(first, columns[None, :], key0[:, None], key1[:, None], threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if EDGE:
            ds = tl.where(rows[:, None] >= first + columns[None, :], ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["T", "H", "threshold"])
def query_kernel(
    qkv, grad_out, lse, delta, grad_qkv, seed, stride_batch, stride_row, grad_stride_batch, grad_stride_row,
    T, H, scale, threshold, keep_scale, LENGTH,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The part of the gradient that belongs to the queries."""
    blocks = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // blocks
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * ROWS  # the longest first
    rows = first_row + tl.arange(0, ROWS)
    batch, column = (head // H).to(tl.int64), head % H * HEAD_DIM
    q_head = qkv + batch * stride_batch + column
    k_head, v_head = q_head + H * HEAD_DIM, q_head + 2 * H * HEAD_DIM

    grad = load_tile(grad_out + batch * grad_stride_batch + column, grad_stride_row, rows, T, HEAD_DIM, WIDTH)
    key0, key1 = rows, rows
    if DROPOUT:
        key0 = row_key(tl.load(seed), 0x9E3779B9, head, rows)
        key1 = row_key(tl.load(seed), 0x85EBCA6B, head, rows)
    q = load_tile(q_head, stride_row, rows, T, HEAD_DIM, WIDTH)
    of_rows = head.to(tl.int64) * T + tl.minimum(rows, T - 1)
    row_lse, row_delta = tl.load(lse + of_rows) * LOG2_E, tl.load(delta + of_rows)
    dq = tl.full((ROWS, WIDTH), 0.0, tl.float32)
    edge = first_row // KEYS * KEYS
    end = tl.minimum(first_row + ROWS, T)
    dq = query_tiles(
        dq, q, grad, row_lse, row_delta, rows, k_head, v_head, stride_row, 0, edge, T, scale * LOG2_E, key0, key1,
        threshold, keep_scale, HEAD_DIM, WIDTH, KEYS, DROPOUT, PRECISION, False)  # fmt: skip
    dq = query_tiles(
        dq, q, grad, row_lse, row_delta, rows, k_head, v_head, stride_row, edge, end, T, scale * LOG2_E, key0, key1,
        threshold, keep_scale, HEAD_DIM, WIDTH, KEYS, DROPOUT, PRECISION, True)  # fmt: skip
    grad_head = grad_qkv + batch * T * 3 * H * HEAD_DIM + column
    store_tile(grad_head, 3 * H * HEAD_DIM, rows, T, dq * scale, HEAD_DIM, WIDTH)


@triton.jit
def key_tiles(
    dk, dv, k, v, keys, first_key, q_head, stride, grad_head, grad_stride, lse, delta, seed, head, begin, end, T,
    scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values from the query rows from begin to end. Scores lie transposed."""
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = tl.minimum(rows, T - 1)
        q = load_tile(q_head, stride, rows, T, HEAD_DIM, WIDTH)
        grad = load_tile(grad_head, grad_stride, rows, T, HEAD_DIM, WIDTH)
        # With an infinite lse a row that repeats the last one has no probability, and adds nothing.
        row_lse = tl.where(rows < T, tl.load(lse + inside) * LOG2_E, float("inf"))
        row_delta = tl.load(delta + inside)
        p = exp2_negative(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - row_lse[None, :])
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        kept_p = p
        if DROPOUT:
            key0 = row_key(tl.load(seed), 0x9E3779B9, head, rows)
            key1 = row_key(tl.load(seed), 0x85EBCA6B, head, rows)
            keep = kept(first_key, tl.arange(0, KEYS)[:, None], key0[None, :], key1[None, :], threshold)
            kept_p = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - row_delta[None, :])
        if EDGE:
            seen = keys[:, None] <= rows[None, :]
            kept_p = tl.where(seen, kept_p, 0.0)
            ds = tl.where(seen, ds, 0.0)
        dv = tl.dot(kept_p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "H", "threshold"])
def key_kernel(
    qkv, grad_out, lse, delta, grad_qkv, seed, stride_batch, stride_row, grad_stride_batch, grad_stride_row,
    T, H, scale, threshold, keep_scale, LENGTH,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The part of the gradient that belongs to the keys and the values."""
    blocks = tl.cdiv(T, KEYS)
    head = tl.program_id(0) // blocks
    first_key = tl.program_id(0) % blocks * KEYS  # the longest first
    keys = first_key + tl.arange(0, KEYS)
    batch, column = (head // H).to(tl.int64), head % H * HEAD_DIM
    q_head = qkv + batch * stride_batch + column
    grad_head = grad_out + batch * grad_stride_batch + column
    lse += head.to(tl.int64) * T
    delta += head.to(tl.int64) * T

    k = load_tile(q_head + H * HEAD_DIM, stride_row, keys, T, HEAD_DIM, WIDTH)
    v = load_tile(q_head + 2 * H * HEAD_DIM, stride_row, keys, T, HEAD_DIM, WIDTH)
    dk = tl.full((KEYS, WIDTH), 0.0, tl.float32)
    dv = tl.full((KEYS, WIDTH), 0.0, tl.float32)
    begin = first_key // ROWS * ROWS
    edge = tl.minimum(tl.cdiv(first_key + KEYS, ROWS) * ROWS, tl.cdiv(T, ROWS) * ROWS)
    dk, dv = key_tiles(
        dk, dv, k, v, keys, first_key, q_head, stride_row, grad_head, grad_stride_row, lse, delta, seed, head,
        begin, edge, T, scale * LOG2_E, threshold, keep_scale,
        HEAD_DIM, WIDTH, ROWS, KEYS, DROPOUT, PRECISION, True)  # fmt: skip
    dk, dv = key_tiles(
        dk, dv, k, v, keys, first_key, q_head, stride_row, grad_head, grad_stride_row, lse, delta, seed, head,
        edge, T, T, scale * LOG2_E, threshold, keep_scale,
        HEAD_DIM, WIDTH, ROWS, KEYS, DROPOUT, PRECISION, False)  # fmt: skip
    dk_head = grad_qkv + batch * T * 3 * H * HEAD_DIM + H * HEAD_DIM + column
    store_tile(dk_head, 3 * H * HEAD_DIM, keys, T, dk * scale, HEAD_DIM, WIDTH)
    store_tile(dk_head + H * HEAD_DIM, 3 * H * HEAD_DIM, keys, T, dv * keep_scale, HEAD_DIM, WIDTH)


# Calling them.

KERNELS = {"forward": forward_kernel, "delta": delta_kernel, "queries": query_kernel, "keys": key_kernel}


def tiles_for(kernel: str, dtype: torch.dtype, head_dim: int) -> list[Tiles]:
    """The tile sizes to choose from."""
    return TILES[kernel, dtype.itemsize, max(64, triton.next_power_of_2(head_dim))]


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: "tf32" where torch is told that its own may be, else "ieee"."""
    matmul: Any = torch.backends.cuda.matmul
    # The older switch cannot be read once the newer one, where torch has it, was used.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def forward(
    qkv: Tensor,
    n_head: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float | None = None,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """The operation minigpt2::attention of fused.py, whose arguments these are, checked; seed is on qkv's device.

    qkv (B, T, 3C), float16, bfloat16 or float32, its last stride 1 -> (B, T, C) and the log-sum-exp (B, H, T), float32.
    On CPU tensors it runs in Triton's interpreter, if TRITON_INTERPRET=1 was set before Triton was imported. `tiles`
    leaves out the choosing.
    """
    B, T, width = qkv.shape
    out = qkv.new_empty((B, T, width // 3))
    lse = torch.empty((B, n_head, T), dtype=torch.float32, device=qkv.device)
    tensors = {"qkv": qkv, "out": out, "lse": lse, "seed": seed if dropout_p else None}
    strides = {"stride_batch": qkv.stride(0), "stride_row": qkv.stride(1)}
    _launch("forward", {**tensors, **strides, **_common(qkv, n_head, dropout_p, scale)}, B * n_head, "ROWS", tiles)
    return out, lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float | None = None,
    *,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:
    """The operation minigpt2::attention_backward: the gradient of qkv, packed like it; `out` and `lse` contiguous.

    `tiles` are those of the queries' kernel and of the keys'.
    """
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse)
    arguments = {
        **{"qkv": qkv, "grad_out": grad_out, "lse": lse, "delta": delta},
        **{"seed": seed if dropout_p else None, "stride_batch": qkv.stride(0), "stride_row": qkv.stride(1)},
        **{"grad_stride_batch": grad_out.stride(0), "grad_stride_row": grad_out.stride(1)},
        **_common(qkv, n_head, dropout_p, scale),
    }
    of_queries, of_keys = tiles or (None, None)
    heads = lse.shape[0] * n_head
    _launch("delta", {**arguments, "out": out}, heads, "ROWS", None)
    _launch("queries", {**arguments, "grad_qkv": grad_qkv}, heads, "ROWS", of_queries)
    _launch("keys", {**arguments, "grad_qkv": grad_qkv}, heads, "KEYS", of_keys)
    return grad_qkv


def _common(qkv: Tensor, n_head: int, dropout_p: float, scale: float | None) -> dict[str, Any]:
    T, head_dim = qkv.shape[1], qkv.shape[2] // 3 // n_head
    return {
        "T": T,
        "H": n_head,
        "scale": checked_scale(scale, head_dim),
        "threshold": int(dropout_p * 65536 + 0.5),
        "keep_scale": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        "LENGTH": min(max(triton.next_power_of_2(T), 128), 4096),  # for the choice of tiles alone
        "HEAD_DIM": head_dim,
        "WIDTH": triton.next_power_of_2(head_dim),
        "DROPOUT": dropout_p > 0,
        "PRECISION": precision(qkv.dtype),
    }


def _launch(kernel: str, arguments: dict[str, Any], heads: int, block: str, tiles: Tiles | None) -> None:
    """Run a kernel with one program for each head and block, of as many rows or keys as `block` says."""
    qkv, T = arguments["qkv"], arguments["T"]
    if not heads * T:
        return
    choices = tiles_for(kernel, qkv.dtype, arguments["HEAD_DIM"])
    if tiles is None and not qkv.is_cuda:
        tiles = choices[0]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (heads * triton.cdiv(T, meta[block]),)

    with torch.cuda.device_of(qkv):
        if tiles is None:
            _tuned(kernel, tuple(choices))[grid](**arguments)
        else:
            KERNELS[kernel][grid](**arguments, **config(tiles).all_kwargs())


def config(tiles: Tiles) -> Any:
    return triton.Config({"ROWS": tiles.rows, "KEYS": tiles.keys}, num_warps=tiles.warps, num_stages=tiles.stages)


@functools.cache
def _tuned(kernel: str, choices: tuple[Tiles, ...]) -> Any:
    """The kernel with its tiles chosen by timing, at the first call for each combination of the key's values.

    The choice is kept on disk with the compiled kernels: another process must not choose otherwise, or a resumed run
    would round otherwise. Tiles that do not fit on the device are left out of the choice by Triton.
    """
    key = ["HEAD_DIM", "LENGTH", "DROPOUT", "PRECISION"]  # and, of itself, the dtypes
    return triton.autotune([config(tiles) for tiles in choices], key=key, cache_results=True)(KERNELS[kernel])
