"""From the definition of attention to the kernel, in steps that each give the numbers of the one before.

One head, causal: q, k, v (T, D), float64 -> out (T, D). Pair (i, j) is query i and key j, and is seen where j <= i. The
names are those of csrc/attention.cpp and of gpu_kernels.py, and of the FlashAttention papers (Dao et al. 2022,
arXiv:2205.14135; Dao 2023, arXiv:2307.08691) but for lse, which they call L, and delta, their D:

    S, P         scores and probabilities; with a running maximum P is exp(S - m), l times as large
    m, l         of a row: the largest score so far, and the sum of exp(S - m)
    O            the sum of exp(S - m) v so far    out     O / l when all keys were met
    lse          m + log l                         dX      the gradient of the loss with respect to X
    Z            what dropout multiplies P by: 0, or 1 / (1 - p)

These are for reading and for tests. `dropout` gives Z for the indices of rows and of columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Dropout = Callable[[Tensor, Tensor], Tensor | float]


def none(rows: Tensor, columns: Tensor) -> float:
    """No dropout."""
    return 1.0


def definition(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout = none) -> Tensor:
    """Three lines, and three T x T matrices: S, P, and P after dropout."""
    place = torch.arange(len(q))
    S = (q @ k.T / math.sqrt(q.size(1))).masked_fill(place[:, None] < place, -math.inf)
    P = S.softmax(1)
    return (P * dropout(place, place)) @ v


def row_by_row(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout = none) -> tuple[Tensor, Tensor]:
    """No matrix. exp(S) may overflow and exp(S - m) cannot; but the largest score m is known only at the end of a row.
    So m is that of the keys so far (Milakov and Gimelshein 2018, arXiv:1805.02867). When it grows to m_new, what was
    summed with exp(S - m) becomes right by one factor, exp(m - m_new). Returns out and lse (T,)."""
    out, lse = torch.empty_like(q), q.new_empty(len(q))
    for i in range(len(q)):
        m, l, O = q.new_tensor(-math.inf), q.new_tensor(0.0), torch.zeros_like(q[i])
        for j in range(i + 1):
            S = q[i] @ k[j] / math.sqrt(q.size(1))
            m_new = torch.maximum(m, S)
            factor, P = torch.exp(m - m_new), torch.exp(S - m_new)
            l = l * factor + P
            O = O * factor + P * dropout(torch.tensor(i), torch.tensor(j)) * v[j]
            m = m_new
        out[i], lse[i] = O / l, m + l.log()
    return out, lse


def in_tiles(
    q: Tensor, k: Tensor, v: Tensor, dropout: Dropout = none, ROWS: int = 16, KEYS: int = 32
) -> tuple[Tensor, Tensor]:
    """The same for ROWS queries and KEYS keys at a time: the dot products become matrix products, for which processors
    are made, and a tile of S stays in the cache. Tiles that lie above the diagonal are left out. This is the forward
    pass of the kernel."""
    T, scale = len(q), 1 / math.sqrt(q.size(1))
    out, lse = torch.empty_like(q), q.new_empty(T)
    for rows in torch.arange(T).split(ROWS):
        m, l = q.new_full((len(rows), 1), -math.inf), q.new_zeros(len(rows), 1)
        O = torch.zeros_like(q[rows])
        for keys in torch.arange(int(rows[-1]) + 1).split(KEYS):
            S = (q[rows] @ k[keys].T * scale).masked_fill(rows[:, None] < keys, -math.inf)
            m_new = torch.maximum(m, S.amax(1, keepdim=True))
            factor, P = torch.exp(m - m_new), torch.exp(S - m_new)
            l = l * factor + P.sum(1, keepdim=True)
            O = O * factor + (P * dropout(rows, keys)) @ v[keys]
            m = m_new
        out[rows], lse[rows] = O / l, (m + l.log()).squeeze(1)
    return out, lse


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, dropout: Dropout = none) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the definition's three lines, last line first: dq, dk and dv. In a row of softmax dP_j / dS_k is
    P_j ((1 if j = k, else 0) - P_k), so dS = P (dP - sum over the row of P dP)."""
    place, scale = torch.arange(len(q)), 1 / math.sqrt(q.size(1))
    P = (q @ k.T * scale).masked_fill(place[:, None] < place, -math.inf).softmax(1)
    Z = dropout(place, place)
    dv = (P * Z).T @ dout
    dP = dout @ v.T * Z
    dS = P * (dP - (P * dP).sum(1, keepdim=True))
    return dS @ k * scale, dS.T @ q * scale, dv


def backward_in_tiles(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: Dropout = none,
    ROWS: int = 16, KEYS: int = 32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same without a T x T matrix, from out and lse, which the forward pass kept. A tile of P is exp(S - lse), as
    exp(lse) is the sum of its whole row. What is left is the sum over a row of P dP, of which a tile sees a part only.
    But with Z for what dropout multiplies by,

        sum_j P_ij dP_ij  =  sum_j P_ij Z_ij (dout_i . v_j)  =  dout_i . (sum_j P_ij Z_ij v_j)  =  dout_i . out_i

    so one pass over out, before everything else, finds it for all rows: delta."""
    T, scale = len(q), 1 / math.sqrt(q.size(1))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (dout * out).sum(1, keepdim=True)
    for keys in torch.arange(T).split(KEYS):
        for rows in torch.arange(int(keys[0]), T).split(ROWS):
            S = (q[rows] @ k[keys].T * scale).masked_fill(rows[:, None] < keys, -math.inf)
            P, Z = torch.exp(S - lse[rows, None]), dropout(rows, keys)
            dP = dout[rows] @ v[keys].T * Z
            dS = P * (dP - delta[rows])
            dv[keys] += (P * Z).T @ dout[rows]
            dk[keys] += dS.T @ q[rows] * scale
            dq[rows] += dS @ k[keys] * scale
    return dq, dk, dv


def kept(seed: int, head: Tensor | int, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Whether dropout keeps an element: a hash of its place and a seed, so that no mask is ever stored, and the
    backward pass draws any tile of it again. csrc/dropout.h says which hash, and whose; here in int64 arithmetic cut to
    32 bits. A word serves two columns 16 apart, its low half the first: each is kept if its 16 bits are at least p 2^16
    (rounded)."""
    low = 0xFFFFFFFF

    def times(x: Tensor, constant: int) -> Tensor:  # mod 2^32 without leaving int64
        return (x * (constant & 0xFFFF) + ((x * (constant >> 16) & 0xFFFF) << 16)) & low

    def mix(x: Tensor) -> Tensor:
        x = times(x ^ x >> 16, 0x7FEB352D)
        x = times(x ^ x >> 15, 0x846CA68B)
        return x ^ x >> 16

    def key(constant: int) -> Tensor:
        first = mix(torch.tensor(((seed & low) + constant) & low, device="cpu")) ^ (seed >> 32 & low)
        return mix(mix((mix(first) + head) & low) ^ rows)

    x = (times(columns // 32 * 16 + columns % 16, 0x9E3779B9) + key(0x9E3779B9)) & low
    x = (times(x ^ x >> 16, 0x7FEB352D) + key(0x85EBCA6B)) & low
    x = times(x ^ x >> 15, 0x846CA68B)
    x = x ^ x >> 16
    return torch.where(columns % 32 < 16, x & 0xFFFF, x >> 16) >= int(p * 65536 + 0.5)


def from_counter(seed: int, head: int, p: float) -> Dropout:
    """The dropout of one head: what is kept is scaled by 1 / (1 - p), so that sums keep their mean."""
    return lambda rows, columns: kept(seed, head, rows[..., None], columns, p).double() / (1 - p)
