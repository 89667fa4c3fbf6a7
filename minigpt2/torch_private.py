"""PyTorch's private names, in one place.

Each is looked up when it is used. Where a version of PyTorch lacks one, what asks for it takes the plain path: the
results are the same, and only time or memory is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "NAMES",
    "alias",
    "backward_keeps_graph",
    "constant_to_compiler",
    "has_onednn",
    "hooked",
    "missing",
    "muon",
    "onednn_linear",
    "onednn_weight_gradient",
    "traced",
    "transformed",
    "under_function_mode",
    "untouched",
]

P = ParamSpec("P")
R = TypeVar("R")

# Without either, a transform is taken to be under way all the time.
FUNCTION_TRANSFORMS = "torch._C._are_functorch_transforms_active"
FORWARD_MODE_LEVEL = "torch.autograd.forward_ad._current_level"
# Without it, a mode is taken to look at every operation.
DISPATCH_MODES = "torch._C._len_torch_dispatch_stack"
# Without it, a mode is taken to look at every function.
FUNCTION_MODES = "torch._C._len_torch_function_stack"
# Without it, every backward pass is taken to keep its graph.
KEEPS_GRAPH = "torch._C._autograd._get_current_graph_task_keep_graph"
# Without it, an alias that is made below autograd does not know of changes in place.
EXCLUDE_KEY = "torch._C._SetExcludeDispatchKeyGuard"
# Without it, every module is taken to have hooks.
GLOBAL_HOOKS = "torch.nn.modules.module._has_any_global_hook"
# Without either, oneDNN makes no product, and the compiled kernel none of bfloat16.
LINEAR = "torch.ops.mkldnn._linear_pointwise"
WEIGHT_GRADIENT = "torch.ops.aten.mkldnn_linear_backward_weights"
# Without it, there is no --optimizer muon.
MUON = "torch.optim._muon.muon"

NAMES = (
    FUNCTION_TRANSFORMS,
    FORWARD_MODE_LEVEL,
    DISPATCH_MODES,
    FUNCTION_MODES,
    KEEPS_GRAPH,
    EXCLUDE_KEY,
    GLOBAL_HOOKS,
    LINEAR,
    WEIGHT_GRADIENT,
    MUON,
)
"""All of them but the mark of `constant_to_compiler`, without which a compiler breaks its graph."""


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
    active, level = found(FUNCTION_TRANSFORMS), found(FORWARD_MODE_LEVEL)
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or active is None or level is None or active() or level >= 0


def traced() -> bool:
    """Whether operations are recorded, or looked at by a mode, rather than only run."""
    if torch.compiler.is_compiling():
        return True
    modes = found(DISPATCH_MODES)
    return modes is None or modes() > 0


def under_function_mode() -> bool:
    """Whether a mode is told of every function of PyTorch's that is called."""
    modes = found(FUNCTION_MODES)
    return modes is None or modes() > 0


_PLAIN = {Tensor, nn.Parameter}


def untouched(*tensors: Tensor) -> bool:
    """Whether these are plain tensors, and nothing but running the operation is asked for: then it may be called
    without PyTorch's dispatcher."""
    return not traced() and not transformed() and {*map(type, tensors)} <= _PLAIN


def backward_keeps_graph() -> bool:
    """Whether the backward pass under way may be repeated, so that what it reads must stay as it is."""
    keeps = found(KEEPS_GRAPH)
    return keeps is None or bool(keeps())


def hooked(*modules: nn.Module) -> bool:
    """Whether something is called with one of these modules when it is called, or instead of its own forward."""
    of_all = found(GLOBAL_HOOKS)
    if of_all is None or of_all():
        return True
    for module in modules:
        its = vars(module)  # in which modules keep all of it; as attributes they take twice as long
        if its["_forward_hooks"] or its["_forward_pre_hooks"] or its["_backward_hooks"] or its["_backward_pre_hooks"]:
            return True
        if "forward" in its or its.get("_compiled_call_impl") is not None:  # of its own compile()
            return True
    return False


def alias(tensor: Tensor) -> Tensor:
    """The tensor without its history; made in a dispatch mode too it shares the counter of changes in place."""
    exclude = found(EXCLUDE_KEY)
    if exclude is None:
        return tensor.detach()
    with exclude(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def has_onednn() -> bool:
    """Whether there are the two operations below, which PyTorch has for its compiler: the only ones that give oneDNN
    float32 to multiply as it lies."""
    return found(LINEAR) is not None and found(WEIGHT_GRADIENT) is not None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias, for x (n, in), weight (out, in) and bias (out): (n, out). Without a gradient."""
    product: Tensor = found(LINEAR)(x, weight, bias, "none", [], "")
    return product


def onednn_weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """x^T @ grad, for x (n, in) and grad (n, out): (in, out). Without a gradient."""
    # Weights of PyTorch's own layers are (out, in): to have ours, input and gradient change places.
    gradient: Tensor = found(WEIGHT_GRADIENT)(x.to_mkldnn(), grad.to_mkldnn(), x, False)[0]
    return gradient


def muon() -> Any:
    """The function that torch.optim.Muon is made of, or None."""
    return found(MUON)


def constant_to_compiler(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.assume_constant_result, without importing the compiler: torch.compile calls the function once,
    while tracing, and takes its result for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
