"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), top to bottom.

Shapes: B sequences in a batch, T tokens in each, C = n_embd, H heads of D = C / H, L = n_layer, V = vocab_size.
Parameters have the names, shapes and layout of the official checkpoint, so weights go in and out as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt2.config import GPT2Config
from minigpt2.device import readable
from minigpt2.loss import linear_cross_entropy
from minigpt2.ops.attention import attention, causal_mask, check_backend, masked_attention, split_heads
from minigpt2.ops.dropout import dropout_add
from minigpt2.ops.gelu import gelu
from minigpt2.ops.products import project, project_transposed
from minigpt2.recompute import check_checkpoint_every, check_recompute, recompute, recompute_input, segments

if TYPE_CHECKING:
    from minigpt2.generate import KVCache, LayerCache

__all__ = ["GPT2", "MLP", "Block", "BlockStack", "CausalSelfAttention", "Projection"]


class Projection(nn.Module):
    """x @ weight + bias, with weight (in, out): the layout of the official files, which call it Conv1D."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = project(x.reshape(-1, x.size(-1)), self.weight, self.bias)  # (B * T, out)
        return y.view(*x.shape[:-1], y.size(-1))


# How to call a function of one tensor that ends in a matrix product: plainly, or (recompute_input) so that what comes
# before the product is recomputed in the backward pass instead of kept.
Product = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


class MLP(nn.Module):
    """LayerNorm (`norm`, which belongs to the block), then two projections with the tanh GELU between them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Projection(config.n_embd, config.inner)
        self.c_proj = Projection(config.inner, config.n_embd)

    def forward(self, x: Tensor, norm: nn.Module, product: Product) -> Tensor:
        h = product(lambda x: self.c_fc(norm(x)), x)  # (B, T, inner)
        return product(lambda h: self.c_proj(gelu(h)), h)  # (B, T, C)


class CausalSelfAttention(nn.Module):
    """LayerNorm (`norm`, which belongs to the block), then H heads: each position attends to itself and the past."""

    def __init__(self, config: GPT2Config, backend: str) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.backend = backend
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, norm: nn.Module, product: Product, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        qkv = product(lambda x: self.c_attn(norm(x)), x)  # (B, T, 3C)
        p = self.attn_pdrop if self.training else 0.0
        if mask is None and (cache is None or cache.length == 0):
            y = attention(qkv, self.n_head, dropout_p=p, backend=self.backend)  # (B, T, C)
            if cache is not None:
                cache.append(*split_heads(qkv, self.n_head)[1:])
        else:
            q, k, v = split_heads(qkv, self.n_head)  # (B, H, T, D) each
            if cache is not None:
                k, v = cache.append(k, v)  # (B, H, past + T, D)
            y = masked_attention(q, k, v, mask, dropout_p=p, backend=self.backend)  # (B, T, C)
        return self.c_proj(y)


class Block(nn.Module):
    """A pre-norm transformer block: each half reads a normalised residual stream and adds to it."""

    def __init__(self, config: GPT2Config, backend: str) -> None:
        super().__init__()
        self.resid_pdrop = config.resid_pdrop
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, backend)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None, pointwise: bool = False
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). With `pointwise`, LayerNorm and GELU are recomputed in the backward pass."""
        p = self.resid_pdrop if self.training else 0.0
        product = recompute_input if pointwise else plainly
        x = dropout_add(self.attn(x, self.ln_1, product, mask, cache), x, p)
        return dropout_add(self.mlp(x, self.ln_2, product), x, p)


class BlockStack(nn.ModuleList):
    """The L blocks, some of which are recomputed in the backward pass (see recompute.py)."""

    def __init__(
        self, config: GPT2Config, *, checkpoint_every: int = 0, recompute: str = "block", attention: str = "auto"
    ) -> None:
        super().__init__(Block(config, attention) for _ in range(config.n_layer))
        self.checkpoint_every = checkpoint_every
        self.recompute = recompute

    @property
    def checkpoint_every(self) -> int:
        """0: no block is recomputed. k = 1..L: exactly L - k blocks are. May be changed between steps."""
        return self._checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, k: int) -> None:
        self._checkpoint_every = check_checkpoint_every(k, len(self))

    @property
    def recompute(self) -> str:
        """What a recomputed block keeps: "block", "keep-attention" or "pointwise". May be changed between steps."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: str) -> None:
        self._recompute = check_recompute(recompute)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        if cache is not None or not (self.training and torch.is_grad_enabled()):
            return self.run(x, mask, 0, len(self), cache)
        keep_attention, pointwise = self.recompute == "keep-attention", self.recompute == "pointwise"
        for start, stop, recomputed in segments(len(self), self.checkpoint_every):
            arguments = (x, mask, start, stop, None, pointwise)
            x = recompute(self.run, *arguments, keep_attention=keep_attention) if recomputed else self.run(*arguments)
        return x

    def run(
        self,
        x: Tensor,
        mask: Tensor | None,
        start: int,
        stop: int,
        cache: KVCache | None = None,
        pointwise: bool = False,
    ) -> Tensor:
        """Blocks start to stop - 1, in order."""
        for i in range(start, stop):
            x = self[i](x, mask, None if cache is None else cache.layers[i], pointwise)
        return x


def _embedding(n: int, width: int) -> nn.Embedding:
    """An embedding that is initialised once, by GPT2.reset_parameters, and not by nn.Embedding first."""
    return nn.Embedding.from_pretrained(torch.empty(n, width), freeze=False)


class GPT2(nn.Module):
    """The language model. `model(input_ids)` gives logits; `model.loss(input_ids, targets)` the training loss.

    `checkpoint_every` and `recompute` trade time for memory (recompute.py); `attention` names the backend
    (minigpt2.ops.attention).
    """

    def __init__(
        self, config: GPT2Config, *, checkpoint_every: int = 0, recompute: str = "block", attention: str = "auto"
    ) -> None:
        super().__init__()
        check_backend(attention)
        self.config = config
        self.wte = _embedding(config.vocab_size, config.n_embd)  # also the output head: the two are tied
        self.wpe = _embedding(config.n_positions, config.n_embd)
        self.h = BlockStack(config, checkpoint_every=checkpoint_every, recompute=recompute, attention=attention)
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, initializer_range), biases 0, and the projections that write to the residual
        stream scaled down by 1/sqrt(2L), since 2L of them add up."""
        if self.wte.weight.is_meta:  # shapes only: weights will come from a file
            return
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))
            elif "ln_" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("weight"):
                parameter.normal_(0.0, std)
            else:
                parameter.zero_()

    @property
    def checkpoint_every(self) -> int:
        """How many blocks are recomputed; see BlockStack."""
        return self.h.checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, k: int) -> None:
        self.h.checkpoint_every = k

    @property
    def recompute(self) -> str:
        """What a recomputed block keeps; see BlockStack."""
        return self.h.recompute

    @recompute.setter
    def recompute(self, recompute: str) -> None:
        self.h.recompute = recompute

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of the token that follows each position.

        input_ids (B, T), integers in [0, V), T <= n_positions. attention_mask (B, past + T): 1 real, 0 padding;
        positions count the real tokens only. With a `cache` that holds `past` tokens, the T new ones continue it.
        Raises ValueError for ids, lengths or masks that do not fit.
        """
        return F.linear(self.hidden(input_ids, attention_mask, cache), self.wte.weight)

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache) -> Tensor:
        """Logits (B, V) of the token after the last one: `forward` without the head of the other positions."""
        return project_transposed(self.hidden(input_ids, attention_mask, cache)[:, -1], self.wte.weight)

    def loss(
        self, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None, *, reduction: str = "mean"
    ) -> Tensor:
        """Cross-entropy in nats over the targets that are not -100: their mean or sum, a scalar; "none": each, (B, T).

        input_ids and targets (B, T); targets are already shifted: targets[b, t] is the token after input_ids[b, t].
        """
        if targets.shape != input_ids.shape:
            raise ValueError(
                f"targets must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(targets.shape)}"
            )
        hidden = self.hidden(input_ids, attention_mask)
        return linear_cross_entropy(hidden, self.wte.weight, targets, reduction=reduction)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The residual stream after the last LayerNorm, (B, T, C): everything but the head."""
        past = 0 if cache is None else cache.length
        self._check_input(input_ids, attention_mask, cache, past)
        T, device = input_ids.size(1), input_ids.device
        real = None if attention_mask is None else attention_mask.to(torch.bool)  # (B, past + T)
        if real is not None and readable(real):
            # Without padding before real tokens, causality is mask enough.
            real = None if bool((real[:, 1:] <= real[:, :-1]).all()) else real
        if real is None:
            positions = torch.arange(past, past + T, device=device)  # (T,)
            # Queries that continue a cache see all of it and one another causally; one query alone sees everything.
            mask = causal_mask(T, past + T, device) if past and T > 1 else None
        else:
            positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T)
            # A padding token sees itself, so that its softmax is defined; nothing real sees padding.
            itself = torch.eye(past + T, dtype=torch.bool, device=device)[past:]
            mask = (causal_mask(T, past + T, device) & real[:, None, None, :]) | itself  # (B, 1, T, past + T)
        p = self.config.embd_pdrop if self.training else 0.0
        x = dropout_add(self.wte(input_ids) + self.wpe(positions), None, p)  # (B, T, C)
        return self.ln_f(self.h(x, mask, cache))

    def _check_input(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None, past: int) -> None:
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be (B, T) with B, T >= 1, got shape {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
        B, T = input_ids.shape
        limit = self.config.n_positions
        if past + T > limit:
            raise ValueError(f"{past + T} tokens exceed the context length n_positions={limit}")
        if cache is not None:
            cache.check(B, T)
        if attention_mask is not None and attention_mask.shape != (B, past + T):
            raise ValueError(f"attention_mask must be {(B, past + T)}, got {tuple(attention_mask.shape)}")
        if readable(input_ids):  # elsewhere the embedding itself asserts
            low, high = (int(bound) for bound in torch.aminmax(input_ids))
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"token id {bad} is outside the vocabulary [0, {self.config.vocab_size})")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        checkpoint_every: int = 0,
        recompute: str = "block",
        attention: str = "auto",
        dtype: torch.dtype = torch.float32,
        **config_overrides: Any,
    ) -> GPT2:
        """Load an official size by name or a folder with config.json and safetensors; see weights.py.

        The model comes in evaluation mode; call `.train()` to train it.
        """
        from minigpt2.weights import from_pretrained

        dials: dict[str, Any] = {"checkpoint_every": checkpoint_every, "recompute": recompute, "attention": attention}
        return from_pretrained(name_or_path, dtype=dtype, **dials, **config_overrides)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json, which transformers loads as they are; see weights.py."""
        from minigpt2.weights import save_pretrained

        save_pretrained(self, folder)

    def generate(
        self,
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
        """Continue input_ids (B, T) by up to max_new_tokens: (B, T + new); see generate.py."""
        from minigpt2.generate import generate

        return generate(
            self,
            input_ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            attention_mask=attention_mask,
            eos_token_id=eos_token_id,
            generator=generator,
        )
