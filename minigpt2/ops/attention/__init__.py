"""Causal self-attention on the packed projection, with a choice of backends.

`"eager"` is the definition (eager.py); `"sdpa"` is PyTorch's scaled_dot_product_attention; `"fused"` is this package's
own kernel (fused.py; cpu.cpp on the CPU, gpu.py on CUDA); `"auto"` takes the one that was measured to be fastest.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.ops.attention.eager import causal_mask, eager_attention, merge_heads, split_heads
from minigpt2.ops.attention.fused import constant_to_compiler, decode, fused_attention, unavailable

__all__ = [
    "BACKENDS",
    "attention",
    "attention_operations",
    "causal_mask",
    "check_backend",
    "explain_backend",
    "masked_attention",
    "resolve_backend",
    "split_heads",
]

BACKENDS = ("auto", "eager", "sdpa", "fused")


def check_backend(backend: str) -> None:
    """Raise ValueError for a name that is not a backend's."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


@constant_to_compiler
def resolve_backend(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend, other than `"auto"`, that serves tensors of this device type, dtype and head size.

    Raises RuntimeError, with the reason, if `"fused"` cannot; `"auto"` then takes sdpa, and says so once. On devices
    other than the CPU `"auto"` is sdpa: the fused kernel for CUDA has not been timed.
    """
    check_backend(backend)
    if backend in ("eager", "sdpa") or (backend == "auto" and device != "cpu"):
        return "sdpa" if backend == "auto" else backend
    reason = unavailable(device, dtype, head_dim)
    if reason is None:
        return "fused"
    if backend == "fused":
        raise RuntimeError(f"fused attention is not available: {reason}")
    _warn_once(reason)
    return "sdpa"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"attention takes the slower sdpa path: {reason}", stacklevel=4)


def explain_backend() -> str:
    """One line: what `"auto"` stands for here, and why."""
    reason = unavailable("cpu", torch.float32, 64)
    cpu = "fused on the CPU (the kernel is built)" if reason is None else f"sdpa on the CPU ({reason})"
    return f"auto is {cpu}, sdpa on other devices (on CUDA fused is there to ask for, but was never timed)"


def attention(qkv: Tensor, n_head: int, *, dropout_p: float = 0.0, backend: str = "auto") -> Tensor:
    """Causal self-attention.

    qkv (B, T, 3C): queries, keys and values side by side, as GPT-2's projection `c_attn` writes them; C is a multiple
    of `n_head`. Returns (B, T, C) in the same dtype. `dropout_p` in [0, 1] drops attention probabilities, always: the
    caller decides about training and evaluation. Raises ValueError for bad sizes or names, RuntimeError for a backend
    asked for by name that cannot serve.
    """
    if qkv.dim() != 3 or qkv.size(2) % (3 * n_head):
        raise ValueError(f"qkv must be (B, T, 3C) with C a multiple of n_head={n_head}, got {tuple(qkv.shape)}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    chosen = resolve_backend(backend, qkv.device.type, qkv.dtype, qkv.size(2) // (3 * n_head))
    if chosen == "fused":
        return fused_attention(qkv, n_head, dropout_p=dropout_p)
    q, k, v = split_heads(qkv, n_head)
    if chosen == "eager":
        y = eager_attention(q, k, v, causal_mask(q.size(2), k.size(2), q.device), dropout_p)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)
    return merge_heads(y)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout_p: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Attention under an explicit mask, for padded batches and for queries that continue a cache.

    q (B, H, T, D), k and v (B, H, S, D); boolean `mask` (True = visible) broadcasts to (B, H, T, S), and None means
    that every query sees every key. Returns (B, T, C). The fused kernel serves one query on the CPU, without mask,
    dropout and gradient, which is what generation asks for; sdpa serves the rest in its stead.
    """
    chosen = resolve_backend(backend, q.device.type, q.dtype, q.size(3))
    if chosen == "eager":
        visible = causal_mask(1, k.size(2), q.device) if mask is None else mask
        y = eager_attention(q, k, v, visible, dropout_p)
    elif chosen == "fused" and _decodes(q, k, mask, dropout_p):
        y = decode(q, k, v)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return merge_heads(y)


def _decodes(q: Tensor, k: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Whether this is the case that fused.decode serves, and large enough that its work outweighs the call."""
    plain = q.device.type == "cpu" and mask is None and q.size(2) == 1 and not dropout_p and not torch.is_grad_enabled()
    return plain and k.size(0) * k.size(2) >= 128


def attention_operations() -> list[Any]:
    """The operations of the dispatcher that are all of attention at once, for recomputation to tell them apart."""
    aten = torch.ops.aten
    return [
        torch.ops.minigpt2.attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
