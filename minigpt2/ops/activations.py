"""The functions that may stand between the two projections of an MLP, by the names that config.json gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.ops.gelu import gelu

__all__ = ["activation"]


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function called `name`, one of config.ACTIVATIONS. GPT-2's own is "gelu_new", the tanh GELU."""
    return _FUNCTIONS[name]


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), gelu),
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu),  # x times the normal distribution function of x
    **dict.fromkeys(("silu", "swish"), F.silu),
    "relu": F.relu,
    "tanh": torch.tanh,
}
