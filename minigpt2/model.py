"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), top to bottom.

Shapes: B sequences in a batch, T tokens in each, C = n_embd, H heads of D = C / H, L = n_layer, V = vocab_size.
Parameters have the names, shapes and layout of the official checkpoint, so weights go in and out as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt2.config import GPT2Config
from minigpt2.inputs import check_input
from minigpt2.loss import linear_cross_entropy
from minigpt2.ops.activations import activation
from minigpt2.ops.attention import attention, check_backend, positions_and_mask
from minigpt2.ops.blocks import decode_blocks
from minigpt2.ops.dropout import dropout_add
from minigpt2.ops.embedding import embed, embedding
from minigpt2.ops.products import project, project_transposed
from minigpt2.pretrained import Pretrained
from minigpt2.recompute import RecomputedStack

if TYPE_CHECKING:
    from minigpt2.generate import KVCache, LayerCache

__all__ = ["GPT2", "MLP", "Block", "BlockStack", "CausalSelfAttention", "Projection"]


class Projection(nn.Module):
    """x @ weight + bias, with weight (in, out): the layout of the official files, which call it Conv1D."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = n_in, n_out  # as in nn.Linear: PEFT asks for them
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = project(x.reshape(-1, x.size(-1)), self.weight, self.bias)  # (B * T, out)
        return y.view(*x.shape[:-1], y.size(-1))


class MLP(nn.Module):
    """Two projections with an activation between them, GPT-2's tanh GELU, for each position by itself."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Projection(config.n_embd, config.inner)
        self.c_proj = Projection(config.inner, config.n_embd)
        self.act = activation(config.activation_function)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))  # (B, T, C) -> (B, T, inner) -> (B, T, C)


class CausalSelfAttention(nn.Module):
    """H heads, in each of which every position attends to itself and to the past."""

    def __init__(self, config: GPT2Config, i: int, backend: str) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.scale = config.attention_scale(i)
        self.attn_pdrop = config.attn_pdrop
        self.backend = backend
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3C)
        p = self.attn_pdrop if self.training else 0.0
        y = attention(qkv, self.n_head, mask=mask, cache=cache, dropout_p=p, scale=self.scale, backend=self.backend)
        return self.c_proj(y)  # (B, T, C)


class Block(nn.Module):
    """A pre-norm transformer block, the i-th, which config.attention_scale may ask: each half reads a normalised
    residual stream and adds to it."""

    def __init__(self, config: GPT2Config, i: int, backend: str) -> None:
        super().__init__()
        self.resid_pdrop = config.resid_pdrop
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, i, backend)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        p = self.resid_pdrop if self.training else 0.0
        x = dropout_add(self.attn(self.ln_1(x), mask, cache), x, p)  # x + dropout(attn(ln_1(x)))
        return dropout_add(self.mlp(self.ln_2(x)), x, p)  # x + dropout(mlp(ln_2(x)))


class BlockStack(RecomputedStack):
    """The L blocks, and the dial that says which of them run again in the backward pass (recompute.py)."""

    def __init__(
        self, config: GPT2Config, *, checkpoint_every: int = 0, recompute: str = "block", attention: str = "auto"
    ) -> None:
        super().__init__(Block(config, i, attention) for i in range(config.n_layer))
        self.checkpoint_every, self.recompute = checkpoint_every, recompute

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        if cache is None:
            return self.run(x, mask)
        if (y := decode_blocks(self, (Block, CausalSelfAttention, MLP, Projection), x, mask, cache)) is not None:
            return y
        for block, layer in zip(self, cache.layers, strict=True):  # once each: what runs adds to the cache
            x = block(x, mask, layer)
        return x


class GPT2(Pretrained):
    """The language model. `model(input_ids)` gives logits; `model.loss(input_ids, targets)` the training loss.

    `checkpoint_every` and `recompute` trade time for memory (recompute.py); `attention` names one of its backends.
    """

    def __init__(
        self, config: GPT2Config, *, checkpoint_every: int = 0, recompute: str = "block", attention: str = "auto"
    ) -> None:
        super().__init__()
        check_backend(attention)
        self.config = config
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = embedding(config.n_positions, config.n_embd)
        self.h = BlockStack(config, checkpoint_every=checkpoint_every, recompute=recompute, attention=attention)
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        if not config.tie_word_embeddings:  # as they are in GPT-2, whose output head is the token embedding
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
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
    def head(self) -> Tensor:
        """The weight of the output head, (V, C)."""
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    checkpoint_every = property(
        lambda self: self.h.checkpoint_every, lambda self, k: setattr(self.h, "checkpoint_every", k)
    )
    recompute = property(lambda self: self.h.recompute, lambda self, kept: setattr(self.h, "recompute", kept))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token that follows each position.

        input_ids (B, T), integers in [0, V), T <= n_positions. attention_mask (B, past + T): 1 real, 0 padding;
        positions count the real tokens only, unless they are given: position_ids (B, T) or (1, T), in [0, n_positions).
        With a `cache` that holds `past` tokens, the T new ones continue it. Raises ValueError for ids, lengths or masks
        that do not fit.
        """
        return F.linear(*self.hidden(input_ids, attention_mask, cache, position_ids))

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache) -> Tensor:
        """Logits (B, V) of the token after the last one: `forward` without the head of the other positions."""
        x, head = self.hidden(input_ids, attention_mask, cache)
        return project_transposed(x[:, -1], head)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy in nats over the targets that are not -100: their mean or sum, a scalar; "none": each, (B, T).

        input_ids and targets (B, T); targets are already shifted: targets[b, t] is the token after input_ids[b, t].
        """
        if targets.shape != input_ids.shape:
            shapes = tuple(input_ids.shape), tuple(targets.shape)
            raise ValueError(f"targets must have the shape of input_ids {shapes[0]}, got {shapes[1]}")
        hidden, head = self.hidden(input_ids, attention_mask, position_ids=position_ids)
        return linear_cross_entropy(hidden, head, targets, reduction=reduction)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after the last LayerNorm, (B, T, C), and the head's weight, (V, C), to make logits of it
        with: not `self.head`, since `embed` lets the gradients of the two uses of a tied weight share memory."""
        past = 0 if cache is None else cache.length
        check_input(self.config, input_ids, attention_mask, cache, position_ids)
        positions, mask = positions_and_mask(input_ids, attention_mask, past)
        positions = positions if position_ids is None else position_ids
        p = self.config.embd_pdrop if self.training else 0.0
        tokens, head = embed(self.wte, input_ids, self.head)
        x = dropout_add(tokens + self.wpe(positions), None, p)  # (B, T, C)
        return self.ln_f(self.h(x, mask, cache)), head
