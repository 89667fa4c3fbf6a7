"""Causal self-attention on the packed projection, with a choice of backends.

`"eager"` is the definition (eager.py); `"sdpa"` is PyTorch's scaled_dot_product_attention; `"fused"` is this package's
own kernel (fused.py; csrc/ on the CPU, gpu.py on CUDA); `"auto"` is fused on the CPU, where that was measured to be
fastest, and sdpa elsewhere, where nothing was measured.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.device import readable
from minigpt2.ops.attention.eager import causal_mask, eager_attention, merge_heads, split_heads
from minigpt2.ops.attention.fused import decode, fused_attention, unavailable
from minigpt2.ops.build import explain_compiler
from minigpt2.ops.kernel import bfloat16_products
from minigpt2.torch_private import constant_to_compiler, transformed

if TYPE_CHECKING:
    from minigpt2.generate import LayerCache

__all__ = [
    "BACKENDS",
    "attention",
    "causal_mask",
    "check_backend",
    "explain_backend",
    "masked_attention",
    "positions_and_mask",
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
    cpu = f"sdpa on the CPU ({reason})"
    if reason is None:
        how = f"its kernel is compiled by {explain_compiler()} and multiplies bfloat16 with {bfloat16_products()}"
        cpu = f"fused on the CPU ({how})"
    return f"auto is {cpu}, sdpa on other devices (on CUDA fused is there to ask for, but was never timed)"


def attention(
    qkv: Tensor,
    n_head: int,
    *,
    mask: Tensor | None = None,
    cache: LayerCache | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal self-attention.

    qkv (B, T, 3C): queries, keys and values side by side, as GPT-2's projection `c_attn` writes them; C is a multiple
    of `n_head`. Returns (B, T, C) in the same dtype. `dropout_p` in [0, 1] drops attention probabilities, always: the
    caller decides about training and evaluation. `scale` > 0 multiplies the scores; None stands for 1 / sqrt(D). Keys
    and values are added to a `cache`, and queries see what it held before. `mask` is one of `positions_and_mask`; None
    stands for the causal mask or, after what a cache held, for all keys. Raises ValueError for bad sizes or names,
    RuntimeError for a backend asked for by name that cannot serve.
    """
    if qkv.dim() != 3 or qkv.size(2) % (3 * n_head):
        raise ValueError(f"qkv must be (B, T, 3C) with C a multiple of n_head={n_head}, got {tuple(qkv.shape)}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    past = 0 if cache is None else cache.length
    q, k, v = split_heads(qkv, n_head)  # (B, H, T, D) each
    keys, values = (k, v) if cache is None else cache.append(k, v)  # (B, H, past + T, D)
    if past or mask is not None:
        return masked_attention(q, keys, values, mask, dropout_p=dropout_p, scale=scale, backend=backend)
    chosen = _resolved(backend, q)
    if chosen == "fused":
        return fused_attention(qkv, n_head, dropout_p=dropout_p, scale=scale)
    if chosen == "eager":
        y = eager_attention(q, k, v, causal_mask(q.size(2), k.size(2), q.device), dropout_p, scale=scale)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p, scale=scale)
    return merge_heads(y)


def _resolved(backend: str, q: Tensor) -> str:
    if backend == "auto" and transformed():
        return "eager"  # which every transform can take
    return resolve_backend(backend, q.device.type, q.dtype, q.size(3))


def positions_and_mask(
    input_ids: Tensor, attention_mask: Tensor | None = None, past: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The positions of input_ids (B, T), which follow `past` cached tokens, and the mask for `attention`.

    attention_mask (B, past + T): 0 where a token is padding, anything else where it is real; positions count the real
    tokens only. Returns positions, (T,) or (B, T), and a boolean mask, True where visible, that broadcasts to
    (B, H, T, past + T), or None where causality is mask enough.
    """
    T, device = input_ids.size(1), input_ids.device
    real = None if attention_mask is None else attention_mask != 0  # (B, past + T)
    if real is not None and readable(real) and bool((real[:, 1:] <= real[:, :-1]).all()):
        real = None  # no padding stands before a real token
    if real is None:
        positions = torch.arange(past, past + T, device=device)  # (T,)
        # Queries that continue a cache see all of it and one another causally; one query alone sees everything.
        return positions, causal_mask(T, past + T, device) if past and T > 1 else None
    positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T)
    # A padding token sees itself, so that its softmax is defined; nothing real sees padding.
    itself = torch.eye(past + T, dtype=torch.bool, device=device)[past:]
    return positions, (causal_mask(T, past + T, device) & real[:, None, None, :]) | itself  # (B, 1, T, past + T)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention under an explicit mask, for padded batches and for queries that continue a cache.

    q (B, H, T, D), k and v (B, H, S, D); boolean `mask` (True = visible) broadcasts to (B, H, T, S), and None means
    that every query sees every key. `scale`: see `attention`. Returns (B, T, C). The fused kernel serves one query on
    the CPU, without mask, dropout and gradient, which is what generation asks for; sdpa serves the rest in its stead.
    """
    if not q.dim() == k.dim() == v.dim() == 4:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q must be (B, H, T, D), k and v (B, H, S, D); got {shapes}")
    chosen = _resolved(backend, q)
    if chosen == "eager":
        visible = causal_mask(1, k.size(2), q.device) if mask is None else mask
        y = eager_attention(q, k, v, visible, dropout_p, scale=scale)
    elif chosen == "fused" and _decodes(q, k, mask, dropout_p):
        y = decode(q, k, v, scale=scale)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return merge_heads(y)


def _decodes(q: Tensor, k: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Whether this is the case that fused.decode serves, and large enough that its work outweighs the call, which sdpa
    has less of; but of bfloat16 sdpa does four times the work."""
    plain = q.device.type == "cpu" and mask is None and q.size(2) == 1 and not dropout_p and not torch.is_grad_enabled()
    return plain and k.size(0) * k.size(2) >= (32 if k.dtype is torch.bfloat16 else 128)
