"""The definition of attention, in plain tensor operations. Every faster path is measured against this one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(n_query: int, n_key: int, device: torch.device) -> Tensor:
    """True where query i may see key j: the queries are the last `n_query` of `n_key` positions. (n_query, n_key)."""
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float = 0.0, *, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v (Vaswani et al. 2017, eq. 1), where `mask` (True = visible) broadcasts to (B, H, T, S),
    and scale None stands for 1 / sqrt(D). q (B, H, T, D); k, v (B, H, S, D), S being T but for a cache -> (B, H, T, D).
    """
    scale = 1 / math.sqrt(q.size(-1) or 1) if scale is None else scale
    scores = (q @ k.transpose(-2, -1)) * scale  # (B, H, T, S)
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return F.dropout(probabilities, dropout_p, training=True) @ v


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3C) -> three views (B, H, T, D)."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
    return q, k, v


def merge_heads(y: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C)."""
    B, H, T, D = y.shape
    return y.transpose(1, 2).reshape(B, T, H * D)
