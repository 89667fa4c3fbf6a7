"""Sampling from the model, with a preallocated cache of keys and values."""

from __future__ import annotations

import codecs
import math
import numbers
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minigpt2.config import GPT2Config
from minigpt2.inputs import check_input
from minigpt2.model import GPT2
from minigpt2.ops.blocks import own_around_blocks

if TYPE_CHECKING:
    from minigpt2.ops import kernel
    from minigpt2.tokenizer import Tokenizer

__all__ = [
    "KVCache",
    "NonFiniteError",
    "Sampling",
    "ends",
    "evaluation_mode",
    "generate",
    "next_token_probabilities",
    "nonfinite",
    "sample_text",
    "stream",
    "stream_text",
]


class NonFiniteError(ValueError):
    """Weights, logits, losses or gradients that are infinite or not a number. Says where they came from."""


class LayerCache:
    """Keys and values of one block: two tensors (B, H, max_length, D), of which the first `length` are filled."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.k, self.v = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) after what is there; return all so far, (B, H, length, D), in the dtype and on the
        device of k. Gradients reach what is new, not what was stored before."""
        start, stop = self.length, self.length + k.size(2)
        if (self.k.dtype, self.k.device) != (k.dtype, k.device):
            # Autocast began or ended since, or the model moved. What is stored keeps all of its digits.
            dtype = torch.promote_types(self.k.dtype, k.dtype) if start else k.dtype
            old = self.k[:, :, :start], self.v[:, :, :start]
            self.k, self.v = (torch.empty_like(t, dtype=dtype, device=k.device) for t in (self.k, self.v))
            if start:
                self.k[:, :, :start], self.v[:, :, :start] = old
        self.k[:, :, start:stop] = k.detach()
        self.v[:, :, start:stop] = v.detach()
        self.length = stop
        if not k.requires_grad:
            return self.k[:, :, :stop].to(k.dtype), self.v[:, :, :stop].to(k.dtype)
        past_k, past_v = self.k[:, :, :start].to(k.dtype), self.v[:, :, :start].to(k.dtype)
        return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)


class KVCache:
    """The past of `batch_size` sequences, up to `max_length` tokens each (default: the model's context length).

    Pass it as `model(input_ids, cache=cache)`: the new tokens continue those it holds, and are added to them. It takes
    2 * L * batch_size * max_length * C elements of the model's dtype (under autocast, of autocast's), on the model's
    device. Gradients flow through the tokens of one call, not into those that the cache held before.
    """

    undisturbed: bool = False
    """Whether no code of others that could change the model runs during calls with this cache, or between them."""
    blocks: kernel.Blocks | None = None
    """What the model's blocks were then found to be, which need not be asked again (ops/blocks.py)."""

    def __init__(self, model: GPT2, batch_size: int, max_length: int | None = None) -> None:
        config, like = model.config, model.wte.weight
        max_length = config.n_positions if max_length is None else max_length
        if not 1 <= max_length <= config.n_positions:
            raise ValueError(f"max_length must be from 1 to n_positions={config.n_positions}, got {max_length}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.batch_size, self.max_length = batch_size, max_length
        self.model_shape = (config.n_layer, config.n_head, config.head_dim)
        shape = (batch_size, config.n_head, max_length, config.head_dim)
        self.layers = [LayerCache(shape, like) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Tokens held so far."""
        return self.layers[0].length

    def check(self, config: GPT2Config, batch_size: int, n_new: int) -> None:
        """Raise ValueError unless n_new more tokens of batch_size sequences fit, of a model of this configuration."""
        shape = (config.n_layer, config.n_head, config.head_dim)
        if shape != self.model_shape:
            raise ValueError(f"the cache was made for (n_layer, n_head, head_dim) = {self.model_shape}, not {shape}")
        if batch_size != self.batch_size:
            raise ValueError(f"the cache was made for {self.batch_size} sequences, got {batch_size}")
        if self.length + n_new > self.max_length:
            raise ValueError(f"the cache holds {self.length} of {self.max_length} tokens; {n_new} more do not fit")
        if any(layer.length != self.length for layer in self.layers):
            raise ValueError("a call that failed has filled a part of the cache's layers only; make a new cache")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its logits. Raises ValueError with every setting that is out of range."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy: it always takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens, and those tied with the last of them."""
    top_p: float | None = None
    """Keep the smallest set of the likeliest tokens whose probabilities reach p (nucleus sampling, Holtzman et al.
    2020)."""

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.temperature, numbers.Real) or not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature!r}")
        if self.top_k is not None and (not isinstance(self.top_k, numbers.Integral) or self.top_k < 1):
            problems.append(f"top_k must be >= 1, got {self.top_k!r}")
        if self.top_p is not None and (not isinstance(self.top_p, numbers.Real) or not 0 < self.top_p <= 1):
            problems.append(f"top_p must be in (0, 1], got {self.top_p!r}")
        if problems:
            raise ValueError("; ".join(problems))

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token id of each row, (B,), given logits (B, V)."""
        if self.temperature == 0:
            return logits.max(-1).indices  # the first of those that are alike, as argmax, and sooner
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution to draw from, (B, V), in float32, given logits (B, V): the logits are divided by the
        temperature, then `top_k` and `top_p` choose in this order, and what they keep is renormalised."""
        logits = logits.float()
        # Relative to the highest, which then cannot overflow, however low the temperature.
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        if self.top_k is not None and self.top_k < logits.size(-1):
            kth = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, index = logits.softmax(-1).sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # probability of everything likelier
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= self.top_p)
            logits = logits.masked_fill(dropped, float("-inf"))
        return logits.softmax(-1)


def next_token_probabilities(logits: Tensor, **sampling: Any) -> Tensor:
    """The distribution to sample from, (B, V), given logits (B, V) and the settings of `Sampling`."""
    return Sampling(**sampling).probabilities(logits)


def stream(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Yield the next token of each row, (B,), up to max_new_tokens times. Arguments are those of `generate`.

    The arguments are checked at once, before the first token is asked for. Between two tokens the model is as the
    caller left it, and so it is when the stream is given up.
    """
    checked = _checked(model, input_ids, max_new_tokens, attention_mask, eos_token_id, sampling)
    return _stream(model, input_ids, max_new_tokens, *checked, attention_mask, generator)


def _checked(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None,
    eos_token_id: int | Sequence[int] | None,
    sampling: dict[str, Any],
) -> tuple[Sampling, tuple[int, ...]]:
    """How to draw, and the ids that end a row; ValueError unless all of this can be asked of `stream`."""
    if not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens!r}")
    settings = Sampling(**sampling)
    ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    if input_ids.dim() == 2 and input_ids.size(1) == 0 < input_ids.size(0):
        raise ValueError("the prompt is empty; start from <|endoftext|> (id 50256) to generate from nothing")
    check_input(model.config, input_ids.cpu(), attention_mask)  # on the CPU, where ids are looked at
    if attention_mask is not None and not bool((attention_mask[:, -1] != 0).all()):
        raise ValueError("attention_mask ends in padding; pad a batch of prompts on the left")
    return settings, ends


def _stream(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    ends: tuple[int, ...],
    mask: Tensor | None,
    generator: torch.Generator | None,
    undisturbed: bool = False,
) -> Iterator[Tensor]:
    """The tokens of `stream`. Undisturbed: no code of others runs between two."""
    B, T = input_ids.shape
    room = model.config.n_positions - T
    n_new = min(max_new_tokens, room)
    # The last token is returned, not fed.
    cache = KVCache(model, B, max(T, T + n_new - 1))
    cache.undisturbed = undisturbed
    if mask is not None and bool((mask != 0).all()):
        mask = None
    done = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    feed, modules = input_ids, list(model.modules())
    for _ in range(n_new):
        # Not around the loop: the caller's code runs between the yields, unless the blocks are known to stay.
        with torch.no_grad(), evaluation_mode(model, modules if cache.blocks is not None else None):
            logits = model.next_logits(feed, mask, cache)  # (B, V)
            if not _finite(logits):
                raise NonFiniteError(
                    f"the logits are not finite: {nonfinite(model) or f'they overflow {logits.dtype}'}"
                )
            token = sampling.draw(logits, generator)
            if ends:
                token = token.masked_fill(done, ends[0])
                for end in ends:
                    done |= token == end
        yield token
        if ends and bool(done.all()):
            return
        feed = token[:, None].to(input_ids.dtype)  # (B, 1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)
    if n_new < max_new_tokens:
        warnings.warn(
            f"stopped at the context length of {model.config.n_positions} tokens, after {n_new} of {max_new_tokens}",
            stacklevel=2,
        )


def generate(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> Tensor:
    """Continue input_ids (B, T) and return (B, T + new), with new <= max_new_tokens.

    `sampling` are the settings of `Sampling`: `temperature` (0 is greedy), `top_k` and `top_p`. A batch of unequal
    prompts is padded on the left, with 0 at the padding in `attention_mask` (B, T). A row that produced `eos_token_id`,
    or one of several, is filled up with it, or the first of them, and generation ends when every row has. At the
    context length it ends with a warning. `generator` draws the samples (the default generator of torch if None).
    Dropout is off, whatever the model's mode, which stays what it is. Raises ValueError for an empty or too long
    prompt, ids outside the vocabulary or sampling settings out of range; NonFiniteError, which is one, for weights that
    give logits which are not finite.
    """
    checked = _checked(model, input_ids, max_new_tokens, attention_mask, eos_token_id, sampling)
    undisturbed = own_around_blocks(model, GPT2)
    tokens = _stream(model, input_ids, max_new_tokens, *checked, attention_mask, generator, undisturbed)
    return torch.cat([input_ids, *(token[:, None].to(input_ids.dtype) for token in tokens)], dim=1)


@contextmanager
def evaluation_mode(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Dropout is off inside; afterwards each module is in the mode that it was in. `modules` are all of the model's,
    if the caller knows them: to find them takes longer than to ask them.

    The modes are set, and not by `eval()`, which some modules of others take as the sign to change their weights.
    """
    training = [module for module in modules or model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def nonfinite(model: nn.Module) -> str | None:
    """Say which parameter is the first that holds a NaN or an infinity, if one does."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not _finite(parameter.detach()):
            return f"{name} holds a NaN or an infinity"
    return None


def _finite(tensor: Tensor) -> bool:
    return all(math.isfinite(bound) for bound in torch.aminmax(tensor))  # a NaN would be both of the bounds


def ends(model: GPT2, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: those of the model's configuration and the tokenizer's."""
    return [i for i in (tokenizer.end_of_text, *model.config.eos_token_ids) if i is not None]


def stream_text(
    model: GPT2,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    *,
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Continue the token ids and yield the text piece by piece, as `stream` makes it, up to one of `ends`,
    which is no text. `ids` grows by what is drawn. An id that the tokenizer lacks, or bytes that are no UTF-8, become
    the replacement character."""
    stops = ends(model, tokenizer)
    settings = {"eos_token_id": stops, "generator": generator, **sampling}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    for token in stream(model, torch.tensor([ids], device=model.wte.weight.device), max_new_tokens, **settings):
        ids.append(int(token))
        if ids[-1] not in stops:
            yield decoder.decode(tokenizer.token_bytes(ids[-1]))
    yield decoder.decode(b"", final=True)


def sample_text(model: GPT2, tokenizer: Tokenizer, n: int, seed: int) -> str:
    """Up to n tokens as text, as many as the context has room for: a document that begins, and those that follow.
    Sampled from the 20 likeliest; a temperature below 1 would keep a model of few steps in a run of spaces."""
    start = torch.tensor([[tokenizer.separator]], device=model.wte.weight.device)
    generator = torch.Generator(start.device).manual_seed(seed)
    n = min(n, model.config.n_positions - 1)
    ids = generate(model, start, n, temperature=1.0, top_k=20, generator=generator)
    return tokenizer.decode(ids[0, 1:].tolist())
