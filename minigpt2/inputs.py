"""What a model may be called with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt2.config import GPT2Config
from minigpt2.device import readable

if TYPE_CHECKING:
    from minigpt2.generate import KVCache

__all__ = ["check_input"]


def check_input(
    config: GPT2Config,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    cache: KVCache | None = None,
    position_ids: Tensor | None = None,
) -> None:
    """Raise ValueError unless input_ids (B, T) are ids of the vocabulary that fit the context and the cache,
    attention_mask is (B, past + T) and position_ids, (B, T) or (1, T), are positions of the context. On an accelerator
    the ids themselves are not looked at, since that would wait for the device: there the embedding's own assertion
    fails."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be (B, T) with B, T >= 1, got shape {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    B, T = input_ids.shape
    past = 0 if cache is None else cache.length
    if past + T > config.n_positions:
        raise ValueError(f"{past + T} tokens exceed the context length n_positions={config.n_positions}")
    if cache is not None:
        cache.check(config, B, T)
    if attention_mask is not None and attention_mask.shape != (B, past + T):
        raise ValueError(f"attention_mask must be {(B, past + T)}, got {tuple(attention_mask.shape)}")
    _check_range(input_ids, config.vocab_size, "token id", "vocabulary")
    if position_ids is not None:
        if position_ids.shape not in ((B, T), (1, T)) or position_ids.dtype not in (torch.int64, torch.int32):
            got = f"{position_ids.dtype} {tuple(position_ids.shape)}"
            raise ValueError(f"position_ids must be integers {(B, T)} or {(1, T)}, got {got}")
        _check_range(position_ids, config.n_positions, "position", "context")


def _check_range(ids: Tensor, n: int, name: str, whole: str) -> None:
    if readable(ids):
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= n:
            raise ValueError(f"{name} {low if low < 0 else high} is outside the {whole} [0, {n})")
