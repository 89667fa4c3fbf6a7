"""Sampling from the model, with a preallocated cache of keys and values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from minigpt2.model import GPT2

__all__ = ["KVCache", "generate", "next_token_probabilities", "stream"]


class LayerCache:
    """Keys and values of one block: two tensors (B, H, max_length, D), of which the first `length` are filled."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.k, self.v = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) after what is there; return all so far, as views (B, H, length, D)."""
        start, stop = self.length, self.length + k.size(2)
        self.k[:, :, start:stop] = k.detach()
        self.v[:, :, start:stop] = v.detach()
        self.length = stop
        return self.k[:, :, :stop], self.v[:, :, :stop]


class KVCache:
    """The past of `batch_size` sequences, up to `max_length` tokens each (default: the model's context length).

    Pass it as `model(input_ids, cache=cache)`: the new tokens continue those it holds, and are added to them. It takes
    2 * L * batch_size * max_length * C elements of the model's dtype, on the model's device. No gradient flows into it.
    """

    def __init__(self, model: GPT2, batch_size: int, max_length: int | None = None) -> None:
        config, like = model.config, model.wte.weight
        max_length = config.n_positions if max_length is None else max_length
        if not 1 <= max_length <= config.n_positions:
            raise ValueError(f"max_length must be from 1 to n_positions={config.n_positions}, got {max_length}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.batch_size, self.max_length = batch_size, max_length
        shape = (batch_size, config.n_head, max_length, config.head_dim)
        self.layers = [LayerCache(shape, like) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Tokens held so far."""
        return self.layers[0].length

    def check(self, batch_size: int, n_new: int) -> None:
        """Raise ValueError unless n_new more tokens of batch_size sequences fit."""
        if batch_size != self.batch_size:
            raise ValueError(f"the cache was made for {self.batch_size} sequences, got {batch_size}")
        if self.length + n_new > self.max_length:
            raise ValueError(f"the cache holds {self.length} of {self.max_length} tokens; {n_new} more do not fit")


def next_token_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution to sample from, (B, V), given logits (B, V).

    In this order: divide by `temperature` (> 0), keep the `top_k` highest, keep the smallest set of the likeliest
    tokens whose probabilities reach `top_p` (nucleus sampling, Holtzman et al. 2020), renormalise.
    """
    logits = logits.float()
    # Relative to the highest, which then cannot overflow, however low the temperature.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = logits.softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of everything likelier
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits.softmax(-1)


def stream(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each row, (B,), up to max_new_tokens times. Arguments are those of `generate`.

    The arguments are checked at once, before the first token is asked for.
    """
    _check_sampling(model, input_ids, max_new_tokens, temperature, top_k, top_p, attention_mask)

    def tokens() -> Iterator[Tensor]:
        was_training = model.training
        model.eval()
        try:
            yield from _stream(
                model, input_ids, max_new_tokens, temperature, top_k, top_p, attention_mask, eos_token_id, generator
            )
        finally:
            model.train(was_training)

    return tokens()


def _stream(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    mask: Tensor | None,
    eos_token_id: int | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    B, T = input_ids.shape
    room = model.config.n_positions - T
    n_new = min(max_new_tokens, room)
    # The last token is returned, not fed.
    cache = KVCache(model, B, max(T, T + n_new - 1))
    if mask is not None and bool((mask != 0).all()):
        mask = None
    done = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    feed = input_ids
    for _ in range(n_new):
        # Not around the loop: the caller's code runs between the yields.
        with torch.inference_mode():
            logits = model.next_logits(feed, mask, cache)  # (B, V)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                probabilities = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
                token = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
            if eos_token_id is not None:
                token = token.masked_fill(done, eos_token_id)
                done |= token == eos_token_id
        yield token
        if eos_token_id is not None and bool(done.all()):
            return
        feed = token[:, None].to(input_ids.dtype)  # (B, 1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)
    if n_new < max_new_tokens:
        warnings.warn(
            f"stopped at the context length of {model.config.n_positions} tokens, after {n_new} of {max_new_tokens}",
            stacklevel=3,
        )


def generate(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue input_ids (B, T) and return (B, T + new), with new <= max_new_tokens.

    `temperature=0` is greedy; see `next_token_probabilities` for the rest. A batch of unequal prompts is padded on the
    left, with 0 at the padding in `attention_mask` (B, T). A row that produced `eos_token_id` is filled up with it, and
    generation ends when every row has. At the context length it ends with a warning. `generator` draws the samples (the
    default generator of torch if None). Dropout is off, whatever the model's mode. Raises ValueError for an empty or
    too long prompt, ids outside the vocabulary, or sampling settings out of range.
    """
    tokens = stream(
        model,
        input_ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        attention_mask=attention_mask,
        eos_token_id=eos_token_id,
        generator=generator,
    )
    return torch.cat([input_ids, *(token[:, None].to(input_ids.dtype) for token in tokens)], dim=1)


def _check_sampling(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    mask: Tensor | None,
) -> None:
    limit = model.config.n_positions
    if input_ids.dim() != 2 or input_ids.size(0) < 1:
        raise ValueError(f"input_ids must be (B, T), got shape {tuple(input_ids.shape)}")
    if input_ids.size(1) == 0:
        raise ValueError("the prompt is empty; start from <|endoftext|> (id 50256) to generate from nothing")
    if input_ids.size(1) > limit:
        raise ValueError(f"the prompt has {input_ids.size(1)} tokens, the context length is {limit}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    for bound in torch.aminmax(input_ids):
        if not 0 <= bound < model.config.vocab_size:
            raise ValueError(f"token id {int(bound)} is outside the vocabulary [0, {model.config.vocab_size})")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must be {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        if not bool((mask[:, -1] != 0).all()):
            raise ValueError("attention_mask ends in padding; pad a batch of prompts on the left")
