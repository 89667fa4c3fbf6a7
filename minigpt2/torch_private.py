"""PyTorch's private names, in one place.

Each is looked up when it is used. Where a version of PyTorch lacks one, what asks for it takes the plain path: the
result is the same, and only time or memory is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "backward_keeps_graph",
    "constant_to_compiler",
    "has_onednn",
    "missing",
    "onednn_linear",
    "onednn_weight_gradient",
    "transformed",
]

P = ParamSpec("P")
R = TypeVar("R")

# Without either, a transform is taken to be under way all the time.
TRANSFORMS = "torch._C._are_functorch_transforms_active"
FORWARD_MODE = "torch.autograd.forward_ad._current_level"
# Without it, the graph is taken to be kept all the time.
KEEPS_GRAPH = "torch._C._autograd._get_current_graph_task_keep_graph"
# Without either, oneDNN makes no product.
LINEAR = "torch.ops.mkldnn._linear_pointwise"
WEIGHT_GRADIENT = "torch.ops.aten.mkldnn_linear_backward_weights"

NAMES = (TRANSFORMS, FORWARD_MODE, KEEPS_GRAPH, LINEAR, WEIGHT_GRADIENT)


def find(name: str) -> Any:
    """What `name` stands for in this PyTorch, or None."""
    value: Any = torch
    for part in name.split(".")[1:]:
        value = getattr(value, part, None)
    return value


def missing() -> list[str]:
    """Which of the names this PyTorch lacks."""
    return [name for name in NAMES if find(name) is None]


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...), forward-mode differentiation or torch.jit.trace is
    under way. They know PyTorch's own operations only."""
    if torch.compiler.is_compiling():
        return False
    active, level = find(TRANSFORMS), find(FORWARD_MODE)
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or active is None or level is None or active() or level >= 0


def backward_keeps_graph() -> bool:
    """Whether the backward pass under way may be repeated, so that what it reads must stay as it is."""
    keeps = find(KEEPS_GRAPH)
    return keeps is None or bool(keeps())


def has_onednn() -> bool:
    """Whether there are the operations, made for PyTorch's compiler, that hand oneDNN a float32 product as it lies."""
    return find(LINEAR) is not None and find(WEIGHT_GRADIENT) is not None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias, for x (n, in), weight (out, in) and bias (out): (n, out). Without a gradient."""
    product: Tensor = find(LINEAR)(x, weight, bias, "none", [], "")
    return product


def onednn_weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """x^T @ grad, for x (n, in) and grad (n, out): (in, out), contiguous. Without a gradient."""
    # Weights of PyTorch's own layers are (out, in): to have ours, input and gradient change places.
    gradient: Tensor = find(WEIGHT_GRADIENT)(x.to_mkldnn(), grad.to_mkldnn(), x, False)[0]
    return gradient


def constant_to_compiler(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.assume_constant_result, without importing the compiler: torch.compile calls the function once,
    while tracing, and takes its result for a constant. A compiler that does not know the mark breaks its graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
