"""Causal self-attention on the packed projection, with a choice of backends.

`"eager"` is the definition; `"sdpa"` is PyTorch's scaled_dot_product_attention; `"auto"` takes the best one available.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.attention.eager import causal_mask, eager_attention

__all__ = [
    "BACKENDS",
    "attention",
    "attention_operations",
    "causal_mask",
    "explain_backend",
    "masked_attention",
    "resolve_backend",
]

BACKENDS = ("auto", "eager", "sdpa")


def resolve_backend(backend: str) -> str:
    """The concrete backend a name stands for; an unknown name raises ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return "sdpa" if backend == "auto" else backend


def explain_backend() -> str:
    """One line: what `"auto"` stands for here, and why."""
    return "sdpa (the fastest of eager and sdpa everywhere)"


def attention(qkv: Tensor, n_head: int, *, dropout_p: float = 0.0, backend: str = "auto") -> Tensor:
    """Causal self-attention.

    qkv (B, T, 3C): queries, keys and values side by side, as GPT-2's projection `c_attn` writes them; C is a multiple
    of `n_head`. Returns (B, T, C) in the same dtype. `dropout_p` in [0, 1) drops attention probabilities, always: the
    caller decides about training and evaluation.
    """
    if qkv.dim() != 3 or qkv.size(2) % (3 * n_head):
        raise ValueError(f"qkv must be (B, T, 3C) with C a multiple of n_head={n_head}, got {tuple(qkv.shape)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    q, k, v = split_heads(qkv, n_head)
    if resolve_backend(backend) == "eager":
        y = eager_attention(q, k, v, causal_mask(q.size(2), k.size(2), q.device), dropout_p)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)
    return merge_heads(y)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout_p: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Attention under an explicit mask, for padded batches and for queries that continue a cache.

    q (B, H, T, D), k and v (B, H, S, D); boolean `mask` (True = visible) broadcasts to (B, H, T, S), and None means
    that every query sees every key. Returns (B, T, C).
    """
    if resolve_backend(backend) == "eager":
        visible = causal_mask(1, k.size(2), q.device) if mask is None else mask
        y = eager_attention(q, k, v, visible, dropout_p)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return merge_heads(y)


def attention_operations() -> list[Any]:
    """The operations of the dispatcher that are all of attention at once, for recomputation to tell them apart."""
    aten = torch.ops.aten
    return [
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3C) -> three views (B, H, T, D)."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
    return q, k, v


def merge_heads(y: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C)."""
    B, H, T, D = y.shape
    return y.transpose(1, 2).reshape(B, T, H * D)
