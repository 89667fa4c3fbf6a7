"""The token embedding and the output head, which in GPT-2 have one weight.

Such a weight has two gradients (V, C): the head's, and the embedding's, which is zero but in the rows of the ids that
were looked up. Autograd makes both whole and adds them up. Here the two uses are one operation of two results, so that
its backward pass is given both gradients and adds the rows to the head's where that lies: V * C numbers less at the end
of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt2.torch_private import hooked, transformed

__all__ = ["embed", "embedding"]


def embedding(n: int, width: int) -> nn.Embedding:
    """An embedding that is initialised once, by GPT2.reset_parameters, and not by nn.Embedding first."""
    return nn.Embedding.from_pretrained(torch.empty(n, width), freeze=False)


def embed(wte: nn.Embedding, ids: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """wte(ids), (..., C) for ids (...), and the head's weight (V, C), through which its gradient comes.

    They are one operation where `head` is the weight of `wte`, on the CPU, and `wte` is no more than a lookup. The
    gradient that reaches the head is changed in place then: what the head goes into must not give it to others too, as
    an addition does.
    """
    if head is wte.weight and head.requires_grad and torch.is_grad_enabled() and _plain(wte):
        rows, head = _Tied.apply(head, ids)
        return rows, head
    return wte(ids), head


def _plain(wte: nn.Embedding) -> bool:
    """Whether a call of `wte` only looks rows up, and nothing is to be told of it."""
    return (
        not torch.compiler.is_compiling()
        and type(wte) is nn.Embedding
        and type(wte.weight) is nn.Parameter
        and wte.weight.is_cpu
        and wte.max_norm is None
        and wte.padding_idx is None
        and not (wte.scale_grad_by_freq or wte.sparse or hooked(wte) or transformed())
    )


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.rows = weight.size(0)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_head: Tensor | None) -> tuple[Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        if grad is None:
            return grad_head, None
        sums = torch.ops.aten.embedding_dense_backward  # of the rows of each id
        if grad_head is None or torch.is_grad_enabled():
            whole = sums(grad, ids, ctx.rows, -1, False)
            return whole if grad_head is None else whole + grad_head, None
        # Summed first, and then added: to the bit what autograd would make of the two.
        different, places = ids.unique(return_inverse=True)
        # Nobody else has the head's gradient: it comes from the product or the loss that the head went into.
        return grad_head.index_add_(0, different, sums(grad, places, len(different), -1, False)), None
