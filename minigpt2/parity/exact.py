"""transformers' model in float64, of which never more than one block is in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Call", "Exact", "answer", "gradients", "in_float64", "recorded", "run"]


class Call(NamedTuple):
    """What a module was called with, and the tensor that it returned (the first, of several)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        return self.args[0]


class Exact(NamedTuple):
    """A forward pass of transformers in float64, along one in its own dtype."""

    streams: list[Tensor]
    """The residual stream that enters each block, and that leaves the last: L + 1 of (B, T, C), float64."""
    logits: Tensor
    """(B, T, V), float64."""
    calls: list[Call]
    """Of each block, in its own dtype."""
    rounded: Tensor
    """The logits in its own dtype."""


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """The last call of each module until the end of the with-block, by name."""
    calls: dict[str, Call] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = Call(args, kwargs, _first(output))

        return hook

    handles = [module.register_forward_hook(remember(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def answer(module: nn.Module, x: Tensor, call: Call | None = None) -> Tensor:
    """What the module makes of x, its other arguments being those of `call`, in the dtype of x."""
    args, kwargs = ((), {}) if call is None else (call.args[1:], call.kwargs)

    def cast(value: Any) -> Any:
        return value.to(x.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return _first(module(x, *map(cast, args), **{name: cast(value) for name, value in kwargs.items()}))


def in_float64(module: nn.Module) -> nn.Module:
    """A copy."""
    return copy.deepcopy(module).double()


@torch.no_grad()
def run(theirs: Any, ids: Tensor, **masks: Tensor) -> Exact:
    """Call transformers' model on ids (B, T), with its own `masks`."""
    body = theirs.transformer
    with recorded({str(i): block for i, block in enumerate(body.h)}) as calls:
        rounded = theirs(ids, use_cache=False, **masks).logits
    positions = masks.get("position_ids", torch.arange(ids.size(1))[None])
    x = body.wte(ids).double() + body.wpe(positions).double()  # (B, T, C)
    streams, in_order = [x], [calls[str(i)] for i in range(len(body.h))]
    for block, call in zip(body.h, in_order, strict=True):
        x = answer(in_float64(block), x, call)
        streams.append(x)
    logits = F.linear(in_float64(body.ln_f)(x), theirs.lm_head.weight.double())
    return Exact(streams, logits, in_order, rounded)


@torch.enable_grad()
def gradients(theirs: Any, ids: Tensor, exact: Exact) -> Iterator[tuple[str, Tensor]]:
    """Yield (official name, gradient in float64) for every parameter, from the head down, of the mean cross-entropy
    with which ids[:, 1:] are predicted in the run `exact` on ids."""
    body = theirs.transformer
    ln_f, head = in_float64(body.ln_f), theirs.lm_head.weight.detach().double().requires_grad_()
    x = exact.streams[-1].detach().requires_grad_()
    logits = F.linear(ln_f(x), head)[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    yield from _named_gradients("ln_f", ln_f)
    above = x.grad
    for i in reversed(range(len(body.h))):
        block, x = in_float64(body.h[i]), exact.streams[i].detach().requires_grad_()
        answer(block, x, exact.calls[i]).backward(above)
        yield from _named_gradients(f"h.{i}", block)
        above = x.grad
    assert above is not None
    assert head.grad is not None
    tied = theirs.lm_head.weight is body.wte.weight
    if not tied:
        yield "lm_head.weight", head.grad
    of_tokens = head.grad if tied else torch.zeros_like(head)
    yield "wte.weight", of_tokens.index_add_(0, ids.flatten(), above.flatten(0, 1))
    of_positions = torch.zeros_like(body.wpe.weight, dtype=torch.float64)
    of_positions[: ids.size(1)] = above.sum(0)
    yield "wpe.weight", of_positions


def _named_gradients(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        yield f"{prefix}.{name}", parameter.grad


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
