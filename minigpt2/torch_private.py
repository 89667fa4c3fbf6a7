"""Names of PyTorch that are not public, in one place. Where one is gone, what asks takes the plain path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["backward_keeps_graph", "constant_to_compiler", "missing", "onednn", "traced", "transformed", "untouched"]

P = ParamSpec("P")
R = TypeVar("R")

NAMES = (
    "torch._C._are_functorch_transforms_active",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch.autograd.forward_ad._current_level",
    "torch.ops.mkldnn._linear_pointwise",
    "torch.ops.aten.mkldnn_linear_backward_weights",
)


def found(name: str) -> Any:
    """What `name` stands for in this PyTorch, or None."""
    owner, last = _place(name)
    return getattr(owner, last, None)


@functools.cache
def _place(name: str) -> tuple[Any, str]:
    """The module of a name, and what it is called there: each call of the model's asks many times."""
    owner: Any = torch
    _, *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    return owner, last


def missing() -> list[str]:
    """Which of these names this PyTorch lacks."""
    return [name for name in NAMES if found(name) is None]


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...), forward-mode differentiation or torch.jit.trace is
    under way. They know PyTorch's own operations only."""
    if torch.compiler.is_compiling():
        return False
    active, level = found(NAMES[0]), found(NAMES[3])
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or active is None or level is None or active() or level >= 0


def traced() -> bool:
    """Whether operations are recorded, or looked at by a mode, rather than only run."""
    if torch.compiler.is_compiling():
        return True
    modes = found(NAMES[1])
    return modes is None or modes() > 0


def untouched(*tensors: Tensor) -> bool:
    """Whether these are plain tensors, and nothing but running the operation is asked for: then it may be called
    without PyTorch's dispatcher."""
    return not traced() and not transformed() and all(type(t) in (Tensor, nn.Parameter) for t in tensors)


def backward_keeps_graph() -> bool:
    """Whether the backward pass under way may be walked once more, so that what it reads must stay as it is."""
    keeps = found(NAMES[2])
    return keeps is None or bool(keeps())


def onednn() -> bool:
    """Whether PyTorch has the operations of its compiler that give oneDNN float32 products to make."""
    return None not in (found(NAMES[4]), found(NAMES[5]))


def constant_to_compiler(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.assume_constant_result, without importing the compiler: torch.compile calls the function once,
    while tracing, and takes its result for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
