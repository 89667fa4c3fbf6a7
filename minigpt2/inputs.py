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
    config: GPT2Config, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
) -> None:
    """Raise ValueError unless input_ids (B, T) are ids of the vocabulary that fit the context and the cache, and
    attention_mask is (B, past + T). On an accelerator the ids themselves are not looked at, since that would wait for
    the device: there the embedding's own assertion fails."""
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
    if readable(input_ids):
        low, high = (int(bound) for bound in torch.aminmax(input_ids))
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary [0, {config.vocab_size})")
