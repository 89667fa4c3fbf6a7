"""What may go wrong in the middle of a run: a signal, gradients that grow, and numbers that are not finite."""

from __future__ import annotations

import functools
import math
import signal
import statistics
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from minigpt2.generate import NonFiniteError

__all__ = ["NonFiniteError", "Norms", "Stop", "first_nonfinite", "stop_on_signals"]


# Those that the system has: batch systems send SIGUSR1 or SIGTERM before the end of a job, terminals SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Stop:
    """Whether a signal asked the run to stop."""

    signal: int = 0
    """The signal, or 0."""


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, the SIGNALS only set `.signal`, which the loop reads when its step is done. A second SIGINT interrupts at
    once. One that was ignored stays so, as SIGHUP is under nohup."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number
        with suppress(OSError):  # after SIGHUP there may be no terminal
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving a snapshot", file=sys.stderr)

    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Norms:
    """The norms of a run's gradients, of which one may be far above those before it: steps of that kind undo what was
    learned, and come of rates that are too high."""

    TIMES = 10.0
    """How far above the median of the last 100 is too far."""
    LEAST = 10
    """How many norms tell what is usual."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=100)
        self._quiet = 0

    def far_above(self, norm: float) -> float | None:
        """Count a norm; the median of those before it, if this one is far above that."""
        if not math.isfinite(norm):
            return None
        median = statistics.median(self._last) if len(self._last) >= self.LEAST else math.inf
        self._last.append(norm)
        return median if norm > self.TIMES * median else None

    def warning(self, row: dict[str, Any], rates: dict[str, float | None]) -> str | None:
        """Count the norm in a step's row of metrics. Returns what to say about it, if it is far above those before it
        and nothing was said in the last 100 steps; `rates` are the settings to lower."""
        self._quiet -= 1
        median = self.far_above(row["grad_norm"])
        if median is None or self._quiet > 0:
            return None
        self._quiet = 100
        lower = " and ".join(f"{name} {value:g}" for name, value in rates.items() if value)
        norm = f"the norm of the gradient is {row['grad_norm']:.3g}, the median of those before it {median:.3g}"
        return f"step {row['step']}: {norm}; if the loss does not come down again, lower {lower}"


@contextmanager
def first_nonfinite(model: nn.Module) -> Iterator[list[str]]:
    """Run a step inside; afterwards the list names, in the order of computation, the modules that made something
    infinite or not a number out of finite inputs, in the forward or in the backward pass. It is empty if everything was
    finite.

    Every tensor is checked, which is slow: this is for a step that is known to be bad and is run again.
    """
    watch = _Watch()
    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(functools.partial(watch.forward, name), with_kwargs=True))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(functools.partial(watch.gradient, name)))
    try:
        yield watch.found
    finally:
        for hook in hooks:
            hook.remove()


class _Watch:
    """The hooks of first_nonfinite, and what they found."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.received: dict[str, bool] = {}  # whether the gradient that reached a module's output was finite

    def forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [*args, *kwargs.values()]
        if not _finite(output) and _finite(inputs):
            weights = all(_finite(p) for p in module.parameters())
            self.found.append(f"the output of {name}" if weights else f"a weight of {name}")
        # A module's own backward hooks would change the graph, and need inputs that have gradients.
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(functools.partial(self.receive, name))
        for tensor in inputs:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(functools.partial(self.send, name))

    def receive(self, name: str, gradient: Tensor) -> None:
        self.received[name] = _finite(gradient)

    def send(self, name: str, gradient: Tensor) -> None:
        if self.received.get(name) and not _finite(gradient):
            self.found.append(f"the backward pass of {name}")

    def gradient(self, name: str, gradient: Tensor) -> None:
        if self.received.get(name.rpartition(".")[0]) and not _finite(gradient):
            self.found.append(f"the gradient of {name}")


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return not isinstance(value, (tuple, list)) or all(_finite(v) for v in value)
