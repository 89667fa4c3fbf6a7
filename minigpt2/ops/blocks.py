"""One more token through the blocks, as in generation, in one call of the compiled kernel (csrc/blocks.cpp).

What must take time in generation is to read the weights, once a token. Each of a block's ten operations is short, but
when it is called the processor's caches are full of weights: one by one they cost about half as much again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minigpt2.ops import kernel
from minigpt2.ops.gelu import gelu
from minigpt2.torch_private import hooked, under_function_mode, untouched

if TYPE_CHECKING:
    from minigpt2.generate import KVCache
    from minigpt2.model import GPT2, BlockStack

__all__ = ["decode_blocks", "own_around_blocks"]


def decode_blocks(
    stack: BlockStack, classes: tuple[type[nn.Module], ...], x: Tensor, mask: Tensor | None, cache: KVCache
) -> Tensor | None:
    """All blocks of the stack for one more token, x (B, 1, C): (B, 1, C). None, and nothing is done, where x is not
    that or a block is not just its operations: under gradients, dropout or a mask, with hooks, adapters or modules of
    others. `classes` are the model's own of a block, its attention, its MLP and their projections."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or mask is not None:
        return None
    if x.size(1) != 1 or x.size(0) > kernel.FEW or torch.is_autocast_enabled("cpu") or not kernel.serves(x):
        return None
    past, blocks = cache.length, cache.blocks
    if blocks is None or not blocks.serve(x, past):
        blocks = _laid_out(stack, classes, x, cache)
    if blocks is None:
        return None
    cache.blocks = blocks if cache.undisturbed else None
    y = kernel.decode_blocks(x, blocks, past)
    for layer in cache.layers:
        layer.length += 1
    return y


def _laid_out(
    stack: BlockStack, classes: tuple[type[nn.Module], ...], x: Tensor, cache: KVCache
) -> kernel.Blocks | None:
    """The blocks as the kernel reads them, if they are just their operations."""
    named, kinds = [pair for block in stack for pair in _named_modules(block)], _kinds(classes)
    if [(name, type(module)) for name, module in named] != kinds * len(cache.layers):
        return None  # what follows takes the modules for those of model.py
    modules = [module for _, module in named]
    if any(module.training for module in modules) or hooked(*modules) or any(_patched(kind) for _, kind in kinds):
        return None
    blocks, past = zip(*[iter(modules)] * len(kinds), strict=True), cache.length
    tensors: list[Any] = []
    numbers, others = [], []
    for (_, ln_1, attn, c_attn, attn_proj, ln_2, mlp, c_fc, mlp_proj), layer in zip(blocks, cache.layers, strict=True):
        parameters = [m._parameters for m in (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj)]
        tensors += [p.get(name) for p in parameters for name in ("weight", "bias")]
        tensors += layer.k, layer.v
        numbers.append((attn.scale, ln_1.eps, ln_2.eps))
        others.append((attn.n_head, attn.backend in ("auto", "fused"), mlp.act, layer.length))
    n_head = others[0][0]
    if others != [(n_head, True, gelu, past)] * len(others) or not untouched(*tensors):
        return None
    tensors = [t.detach() for t in tensors]  # which hold the memory also when another thread gives the model other
    return kernel.Blocks(tensors, n_head, numbers) if kernel.serves_blocks(x, tensors, n_head, past) else None


def _named_modules(block: nn.Module) -> list[tuple[str, Any]]:
    """The block, its parts and theirs, each after its name: `named_modules` takes four times as long."""
    found: list[tuple[str, Any]] = [("", block)]
    for name, part in block._modules.items():
        found += [(name, part), *(part._modules.items() if part is not None else ())]
    return found


@functools.cache
def _kinds(classes: tuple[type[nn.Module], ...]) -> list[tuple[str, type[nn.Module]]]:
    """The names and classes of a block's modules, as model.py makes it."""
    block, attention, mlp, projection = classes
    first = [("ln_1", nn.LayerNorm), ("attn", attention), ("c_attn", projection), ("c_proj", projection)]
    second = [("ln_2", nn.LayerNorm), ("mlp", mlp), ("c_fc", projection), ("c_proj", projection)]
    return [("", block), *first, *second]


def _patched(kind: type[nn.Module], method: str = "forward") -> bool:
    """Whether somebody has given this class another method of this name."""
    return getattr(getattr(kind, method), "__globals__", {}).get("__name__") != kind.__module__


def own_around_blocks(model: GPT2, own: type[GPT2]) -> bool:
    """Whether in a call of the model only its own code runs, and PyTorch's, besides its blocks'."""
    if type(model) is not own or type(model.h).__module__ != own.__module__:
        return False
    embedding = nn.Embedding
    kinds = {"wte": embedding, "wpe": embedding, "h": type(model.h), "ln_f": nn.LayerNorm, "lm_head": nn.Linear}
    return (
        not any(method in vars(model) or _patched(own, method) for method in ("hidden", "next_logits"))
        and all(type(part) is kinds.get(name) and not _patched(type(part)) for name, part in model.named_children())
        and not hooked(*model.modules())
        and not under_function_mode()
    )
