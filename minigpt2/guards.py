"""What may go wrong in the middle of a run: a signal, and a number that is not one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NonFiniteError", "Stop", "first_nonfinite", "stop_on_signals"]


class NonFiniteError(RuntimeError):
    """A loss or a gradient that is infinite or not a number. Says where it came from."""


class Stop:
    """Whether SIGINT or SIGTERM asked the run to stop."""

    signal: int = 0
    """The signal, or 0."""


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, SIGINT and SIGTERM only set `.signal`, for the loop to see when its step is done. A second SIGINT
    interrupts at once."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving a snapshot", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def first_nonfinite(model: nn.Module) -> Iterator[list[str]]:
    """Run a step inside; afterwards the list says, in order, which modules had finite inputs and non-finite outputs, in
    the forward pass and then in the backward pass. It is empty if everything was finite.

    Every tensor is looked at, so this is for a step that is known to be bad and is run again.
    """
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(_forward_hook(name, found), with_kwargs=True))
            hooks.append(module.register_full_backward_hook(_backward_hook(name, found)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(_gradient_hook(name, found)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _forward_hook(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # A container finishes after what it contains, which is named already.
        if not _finite(output) and not any(
            f.startswith(("the output of " + name, "the weights of " + name)) for f in found
        ):
            if not all(torch.isfinite(p).all() for p in module.parameters(recurse=False)):
                found.append(f"the weights of {name}")
            elif _finite([*args, *kwargs.values()]):
                found.append(f"the output of {name}")

    return hook


def _backward_hook(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        if _finite(grad_output) and not _finite(grad_input):
            found.append(f"the backward pass of {name}")

    return hook


def _gradient_hook(name: str, found: list[str]) -> Any:
    def hook(parameter: Tensor) -> None:
        if not _finite(parameter.grad):
            found.append(f"the gradient of {name}")

    return hook


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return not isinstance(value, (tuple, list)) or all(_finite(v) for v in value)
