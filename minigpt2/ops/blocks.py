"""One more token through the blocks, as in generation, in one call of the compiled kernel (csrc/blocks.cpp).

In generation the weights are read once a token, which is what must take time. The ten operations of a block are called
in far less than that, but each of them after the last has filled the caches with weights: together they cost half as
much again, as they do where a block has a hook.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minigpt2.ops import kernel
from minigpt2.ops.gelu import gelu
from minigpt2.torch_private import hooked

if TYPE_CHECKING:
    from minigpt2.generate import KVCache
    from minigpt2.model import BlockStack

__all__ = ["decode_blocks"]

_NAMES = [["ln_1", "attn", "ln_2", "mlp"], ["c_attn", "c_proj"], ["c_fc", "c_proj"]]


def decode_blocks(stack: BlockStack, x: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor | None:
    """All blocks of the stack for one more token, x (B, 1, C): (B, 1, C). None, and nothing is done, where x is not
    that or a block is not just its operations: under gradients, dropout or a mask, with hooks, adapters or modules of
    others."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or mask is not None:
        return None
    if x.size(1) != 1 or x.size(0) > kernel.FEW or not kernel.serves(x):
        return None
    blocks, past = [_modules(block) for block in stack], cache.length
    modules = [module for block in blocks for module in block]
    if [type(module) for module in modules] != _kinds() * len(cache.layers):
        return None  # what follows takes the modules for those of model.py
    if any(module.training for module in modules) or hooked(*modules) or _patched():
        return None
    if any([[*block[i]._modules] for i in (0, 2, 6)] != _NAMES for block in blocks):
        return None
    tensors: list[Any] = []
    numbers, others = [], []
    for (_, ln_1, attn, c_attn, attn_proj, ln_2, mlp, c_fc, mlp_proj), layer in zip(blocks, cache.layers, strict=True):
        parameters = [m._parameters for m in (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj)]
        tensors += [p.get(name) for p in parameters for name in ("weight", "bias")]
        tensors += layer.k, layer.v
        numbers.append((attn.scale, ln_1.eps, ln_2.eps))
        others.append((attn.n_head, attn.backend in ("auto", "fused"), mlp.act, layer.length))
    # Views of the memory as it is now, which another thread may give back meanwhile.
    tensors = [t if t is None else t.detach() for t in tensors]
    n_head = blocks[0][2].n_head
    if others != [(n_head, True, gelu, past)] * len(blocks) or not kernel.serves_blocks(x, tensors, n_head, past):
        return None
    y = kernel.decode_blocks(x, tensors, n_head, past, numbers)
    for layer in cache.layers:
        layer.length += 1
    return y


def _modules(block: nn.Module) -> list[Any]:
    """The block, its parts and theirs, in the order of `modules`, which takes four times as long."""
    parts = block._modules.values()
    return [block, *(m for part in parts if part is not None for m in (part, *part._modules.values()))]


@functools.cache
def _kinds() -> list[type[nn.Module]]:
    """Those of a block as model.py makes it."""
    from minigpt2.model import MLP, Block, CausalSelfAttention, Projection

    half = [Projection, Projection]
    return [Block, nn.LayerNorm, CausalSelfAttention, *half, nn.LayerNorm, MLP, *half]


def _patched() -> bool:
    """Whether somebody has given one of their classes another forward."""
    return any(getattr(kind.forward, "__globals__", {}).get("__name__") != kind.__module__ for kind in _kinds())
