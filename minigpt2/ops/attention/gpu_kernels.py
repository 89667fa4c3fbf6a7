"""Causal multi-head attention on the GPU, in Triton: csrc/attention.cpp's operation, with its dropout mask bit for bit.

The method is FlashAttention-2 (Dao 2023, arXiv:2307.08691). For one head, with S = scale * Q K^T:
  forward:    a program has one band of query rows; for each tile of keys on or below the diagonal:
                m' <- max(m, rowmax S);  P <- exp(S - m');  factor <- exp(m - m')
                l <- factor l + rowsum P;  O <- factor O + dropout(P) V;  m <- m'
              out = O / l, and lse = m + log l is all that the backward pass needs to rebuild P.
  delta:      a program has one band of query rows, of which it finds delta <- rowsum(dOut * out),
              or, where one tile has the whole row, rowsum(P dP), which is the same
  queries:    a program has one band of query rows; for each tile of keys:
                P <- exp(S - lse);  dP <- dropout(dOut V^T);  dQ += scale P (dP - delta) K
  keys:       a program has one band of keys; for each tile of query rows on or below the diagonal, P and dP as above:
                dV += dropout(P)^T dOut;  dK += scale (P (dP - delta))^T Q
Every result has one writer, which adds in a fixed order: no atomics, so a run repeats bit for bit as long as the tile
sizes are the same. m, l and O, S and P are those of steps.py.

q, k and v are read where the projection left them, in the packed (B, T, 3C) tensor. Rows past the end of a sequence
repeat its last row: nothing is out of bounds, and what they add is 0 or never stored. Exponentials are to base 2,
because that is the instruction; a factor of log2(e) is part of the scale. Sums are float32.

One thing is not as on the CPU. A product on the diagonal multiplies masked pairs by 0, and 0 * NaN is NaN: what is not
finite may reach rows of its own tile that do not see it, but none before that tile. (To clear it out of the operands
was tried: it takes so many registers that fewer programs fit on a GPU at a time.)

gpu.py chooses tiles and calls these.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = ["delta_kernel", "forward_kernel", "key_kernel", "query_kernel"]

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
    O, m, l, q, rows, k_head, v_head, stride, begin, end, T, scale, key0, key1, threshold,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """One band of query rows against the keys from begin to end. With EDGE, keys may lie above the diagonal."""
    for first in range(begin, end, KEYS):
        columns = tl.arange(0, KEYS)
        k = load_tile(k_head, stride, first + columns, T, HEAD_DIM, WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if EDGE:
            s = tl.where(rows[:, None] >= first + columns[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = exp2_negative(s - m_new[:, None])
        factor = tl.exp2(m - m_new)
        l = l * factor + tl.sum(p, axis=1)
        O = O * factor[:, None]
        m = m_new
        if DROPOUT:
            p = tl.where(kept(first, columns[None, :], key0[:, None], key1[:, None], threshold), p, 0.0)
        v = load_tile(v_head, stride, first + columns, T, HEAD_DIM, WIDTH)
        O = tl.dot(p.to(v.dtype), v, O, input_precision=PRECISION)
    return O, m, l


@triton.jit(do_not_specialize=["T", "H", "threshold"])
def forward_kernel(
    qkv, out, lse, seed, stride_batch, stride_row, T, H, scale, threshold, keep_scale, LENGTH,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    bands = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // bands
    first_row = (bands - 1 - tl.program_id(0) % bands) * ROWS  # the longest first
    rows = first_row + tl.arange(0, ROWS)
    q_head = qkv + (head // H).to(tl.int64) * stride_batch + head % H * HEAD_DIM
    k_head, v_head = q_head + H * HEAD_DIM, q_head + 2 * H * HEAD_DIM

    key0, key1 = rows, rows
    if DROPOUT:
        key0 = row_key(tl.load(seed), 0x9E3779B9, head, rows)
        key1 = row_key(tl.load(seed), 0x85EBCA6B, head, rows)
    q = load_tile(q_head, stride_row, rows, T, HEAD_DIM, WIDTH)
    O = tl.full((ROWS, WIDTH), 0.0, tl.float32)
    m = tl.full((ROWS,), LOWEST, tl.float32)
    l = tl.full((ROWS,), 0.0, tl.float32)
    edge = first_row // KEYS * KEYS
    end = tl.minimum(first_row + ROWS, T)
    scale *= LOG2_E
    O, m, l = forward_tiles(
        O, m, l, q, rows, k_head, v_head, stride_row, 0, edge, T, scale, key0, key1, threshold,
        HEAD_DIM, WIDTH, KEYS, DROPOUT, PRECISION, False)  # fmt: skip
    O, m, l = forward_tiles(
        O, m, l, q, rows, k_head, v_head, stride_row, edge, end, T, scale, key0, key1, threshold,
        HEAD_DIM, WIDTH, KEYS, DROPOUT, PRECISION, True)  # fmt: skip

    O = O * (keep_scale / l)[:, None]
    out_head = out + (head // H).to(tl.int64) * T * H * HEAD_DIM + head % H * HEAD_DIM
    store_tile(out_head, H * HEAD_DIM, rows, T, O, HEAD_DIM, WIDTH)
    tl.store(lse + head.to(tl.int64) * T + rows, (m + tl.log2(l)) * LN_2, mask=rows < T)


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
    bands = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // bands
    first_row = tl.program_id(0) % bands * ROWS
    rows = first_row + tl.arange(0, ROWS)
    batch, column = (head // H).to(tl.int64), head % H * HEAD_DIM
    dout = load_tile(grad_out + batch * grad_stride_batch + column, grad_stride_row, rows, T, HEAD_DIM, WIDTH)
    y = load_tile(out + batch * T * H * HEAD_DIM + column, H * HEAD_DIM, rows, T, HEAD_DIM, WIDTH)
    row_delta = tl.sum(dout.to(tl.float32) * y.to(tl.float32), axis=1)
    if first_row == 0:
        # All keys of these rows are in one tile, so delta can be had as rowsum(P dP): from P and dP as they are, not
        # from the output as it was rounded. Where a row sees a key or two, nearly all of dP - delta cancels; and that
        # P (dP - delta) l to 0 must hold for P as it was rounded, whose sum is not quite 1.
        q_head = qkv + batch * stride_batch + column
        q = load_tile(q_head, stride_row, rows, T, HEAD_DIM, WIDTH)
        k = load_tile(q_head + H * HEAD_DIM, stride_row, rows, T, HEAD_DIM, WIDTH)
        v = load_tile(q_head + 2 * H * HEAD_DIM, stride_row, rows, T, HEAD_DIM, WIDTH)
        row_lse = tl.load(lse + head.to(tl.int64) * T + tl.minimum(rows, T - 1)) * LOG2_E
        p = exp2_negative(tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E) - row_lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
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
    dq, q, dout, lse, delta, rows, k_head, v_head, stride, begin, end, T, scale, key0, key1, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The gradient of one band of query rows from the keys from begin to end."""
    for first in range(begin, end, KEYS):
        columns = tl.arange(0, KEYS)
        k = load_tile(k_head, stride, first + columns, T, HEAD_DIM, WIDTH)
        v = load_tile(v_head, stride, first + columns, T, HEAD_DIM, WIDTH)
        p = exp2_negative(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
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
    bands = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // bands
    first_row = (bands - 1 - tl.program_id(0) % bands) * ROWS  # the longest first
    rows = first_row + tl.arange(0, ROWS)
    batch, column = (head // H).to(tl.int64), head % H * HEAD_DIM
    q_head = qkv + batch * stride_batch + column
    k_head, v_head = q_head + H * HEAD_DIM, q_head + 2 * H * HEAD_DIM

    dout = load_tile(grad_out + batch * grad_stride_batch + column, grad_stride_row, rows, T, HEAD_DIM, WIDTH)
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
        dq, q, dout, row_lse, row_delta, rows, k_head, v_head, stride_row, 0, edge, T, scale * LOG2_E, key0, key1,
        threshold, keep_scale, HEAD_DIM, WIDTH, KEYS, DROPOUT, PRECISION, False)  # fmt: skip
    dq = query_tiles(
        dq, q, dout, row_lse, row_delta, rows, k_head, v_head, stride_row, edge, end, T, scale * LOG2_E, key0, key1,
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
    """The gradients of one band of keys and values from the query rows from begin to end. Scores lie transposed."""
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = tl.minimum(rows, T - 1)
        q = load_tile(q_head, stride, rows, T, HEAD_DIM, WIDTH)
        dout = load_tile(grad_head, grad_stride, rows, T, HEAD_DIM, WIDTH)
        # With an infinite lse a row that repeats the last one has no probability, and adds nothing.
        row_lse = tl.where(rows < T, tl.load(lse + inside) * LOG2_E, float("inf"))
        row_delta = tl.load(delta + inside)
        p = exp2_negative(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - row_lse[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
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
        dv = tl.dot(kept_p.to(dout.dtype), dout, dv, input_precision=PRECISION)
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
    bands = tl.cdiv(T, KEYS)
    head = tl.program_id(0) // bands
    first_key = tl.program_id(0) % bands * KEYS  # the longest first
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
