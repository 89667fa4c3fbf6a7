"""A checkpoint: a function that keeps what it was given, and runs again when the backward pass needs what it made.

While a function runs, autograd saves what its backward pass will read. Here every tensor it saves is replaced by an
empty slot, and freed. When the backward pass asks for the first of them, the function runs a second time, with the
random state and the autocast of the first, saves the same tensors in the same order, and so fills the slots. This is
rematerialisation as Chen et al. had it (2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174).

`Kept` lets a checkpoint keep the results of some operations, which then run once: dearer in memory, cheaper in time.

PyTorch's torch.utils.checkpoint does both, and is what torch.compile understands; but it imports PyTorch's compiler,
which takes 72 to 144 MiB of a training process and a second (`minigpt2/memory.py` has the figures). That would be most
of what the last notches of the dial save.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt2.torch_private import alias, backward_keeps_graph

__all__ = ["Contexts", "Kept", "checkpoint"]

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""What surrounds the first run of a function, and the second."""


def checkpoint(
    function: Callable[..., Tensor], *args: Any, contexts: Contexts | None = None, early_stop: bool = False
) -> Tensor:
    """Call function(*args), of which only the tensors among `args` are kept: the backward pass runs it again.

    args: as the function wants them, a tensor first, on whose device it runs. With `early_stop` the second run ends
    once it has made the last tensor that the backward pass reads. The function must do the same both times, apart from
    what it draws from PyTorch's random state: RuntimeError in the backward pass where it saves tensors of other shapes,
    dtypes or devices, or more or fewer of them. Other values, as of a weight that was changed in between, go unnoticed.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    first, second = contexts or (nullcontext(), nullcontext())
    frame = _Frame(function, args, second, early_stop)
    with saved_tensors_hooks(frame.empty_slot, frame.read), first:
        return function(*args)


class _Slot:
    """The place of one saved tensor. It lives as long as the node of the graph that will read it."""

    def __init__(self, frame: _Frame, tensor: Tensor) -> None:
        self.frame, self.kind = frame, _kind(tensor)
        self.tensor: Tensor | None = None


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


class _Frame:
    """One run of a function, and what it takes to repeat it. Kept alive by its slots, and by nothing else."""

    def __init__(
        self, function: Callable[..., Tensor], args: tuple[Any, ...], second: AbstractContextManager[Any], stop: bool
    ) -> None:
        self.function, self.second, self.early_stop = function, second, stop
        # A node of the graph that is there to hold the inputs, as an operation holds what it saves: so a checkpoint
        # around this one drops them, and makes them again when they are read back by `saved_tensors`.
        self.places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        tensors = [args[i] for i in self.places]
        self.inputs: Any = _Inputs.apply(torch.empty(0, requires_grad=True), *tensors)  # type: ignore[no-untyped-call]
        self.others = [None if isinstance(a, Tensor) else a for a in args]
        self.surroundings = _Surroundings.of(tensors[0].device)
        self.slots: list[weakref.ref[_Slot]] = []

    def empty_slot(self, tensor: Tensor) -> _Slot:
        """Stand in for a tensor that the first run saves."""
        slot = _Slot(self, tensor)
        self.slots.append(weakref.ref(slot))
        return slot

    def read(self, slot: _Slot) -> Tensor:
        """What belongs into a slot, which is empty again afterwards: a backward pass reads each once, and if it is
        repeated the function runs once more."""
        if slot.tensor is None:
            self._fill()
        tensor, slot.tensor = slot.tensor, None
        return cast("Tensor", tensor)

    def _fill(self) -> None:
        """Run the function again, and put what it saves into the slots that are still to be read."""
        args = list(self.others)
        for i, tensor in zip(self.places, self.inputs.grad_fn.saved_tensors, strict=True):
            args[i] = tensor.detach().requires_grad_(tensor.requires_grad)
        remaining = iter(self.slots)
        left = len(self.slots)

        def save(tensor: Tensor) -> Tensor:
            nonlocal left
            # Detached: with its history, what an operation made and saves itself would keep the operation alive.
            tensor, slot, left = tensor.detach(), next(remaining, lambda: None)(), left - 1
            if slot is not None:
                if slot.kind != _kind(tensor):
                    raise RuntimeError(f"a recomputed function saved {_kind(tensor)} where it had saved {slot.kind}")
                slot.tensor = tensor
            if self.early_stop and not left:
                raise _Stop(self)
            return tensor

        with torch.enable_grad(), self.surroundings.restored(), saved_tensors_hooks(save, lambda t: t), self.second:
            try:
                self.function(*args)
            except _Stop as stop:
                if stop.frame is not self:
                    raise
        if left:
            saved = len(self.slots)
            raise RuntimeError(f"a recomputed function saved {saved - left} tensors where it had saved {saved}")


class _Stop(Exception):
    def __init__(self, frame: _Frame) -> None:
        self.frame = frame


class _Inputs(torch.autograd.Function):
    """Holds tensors as an operation does that saves them for its backward pass. It has none."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)


class _Surroundings(NamedTuple):
    """What a function depends on besides its arguments: the random states and the autocasts, of CPU and device."""

    device: torch.device
    random: Tensor
    on_device: Tensor | None
    autocasts: list[tuple[str, torch.dtype, bool, bool]]

    @classmethod
    def of(cls, device: torch.device) -> _Surroundings:
        """As they are now, for a function that runs on `device`."""
        cache = torch.is_autocast_cache_enabled()
        types = [t for t in {"cpu", device.type} if torch.amp.is_autocast_available(t)]
        casts = [(t, torch.get_autocast_dtype(t), torch.is_autocast_enabled(t), cache) for t in types]
        generator = _generator(device)
        return cls(device, torch.get_rng_state(), generator[0]() if generator else None, casts)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As they were then; afterwards the random states are again what they are now."""
        now = self.of(self.device)
        with ExitStack() as stack:
            for autocast in self.autocasts:
                stack.enter_context(torch.autocast(*autocast))
            self._set_random()
            try:
                yield
            finally:
                now._set_random()

    def _set_random(self) -> None:
        torch.set_rng_state(self.random)
        if (generator := _generator(self.device)) is not None:
            generator[1](self.on_device)


def _generator(device: torch.device) -> tuple[Callable[[], Tensor], Callable[[Any], None]] | None:
    """What gets and what sets the random state of an accelerator; None for a device that has none of its own."""
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "set_rng_state"):
        return None
    if device.type == "mps":  # of which there is one
        return module.get_rng_state, module.set_rng_state
    return lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)


class Kept:
    """The results that a checkpoint keeps, so that the second run finds them here and does not make them again.

    `rule()` begins a run and returns what says of each operation in turn whether its result is kept. It must say the
    same in both runs. With retain_graph=True the next backward pass finds the results too.
    """

    def __init__(self, rule: Callable[[], Callable[[Any], bool]]) -> None:
        self.rule = rule
        self.results: list[tuple[Any, int] | None] = []

    def contexts(self) -> Contexts:
        """Those of the first and of the second run, for `checkpoint`."""
        return _Run(self, self._keep), _Run(self, self._find)

    def _keep(self, index: int, operation: Any, args: Any, kwargs: Any) -> Any:
        result = operation(*args, **kwargs)
        self.results.append((_detached(result), _version(result)))
        return result

    def _find(self, index: int, operation: Any, args: Any, kwargs: Any) -> Any:
        if (found := self.results[index]) is None:
            raise RuntimeError(
                "what a checkpoint kept was read before: backward(retain_graph=True) keeps it longer. (An autograd "
                "Function in it may read its saved_tensors once.)"
            )
        result, version = found
        if _version(result) != version:
            raise RuntimeError(f"what a checkpoint kept of {operation} was changed in place before the backward pass")
        if not backward_keeps_graph():
            self.results[index] = None
        return _detached(result)


class _Run(TorchDispatchMode):
    """Sees every operation of a run of the function, and has `answer` make the results that are kept."""

    def __init__(self, kept: Kept, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.begin, self.answer = kept.rule, answer

    def __enter__(self) -> Any:
        self.keeps, self.index = self.begin(), 0
        return super().__enter__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to hide this class from PyTorch's compiler takes the import of the compiler

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.keeps(operation):
            return operation(*args, **(kwargs or {}))
        self.index += 1
        return self.answer(self.index - 1, operation, args, kwargs or {})


def _detached(result: Any) -> Any:
    """A result of an operation, each tensor in it without its history."""
    if isinstance(result, tuple):
        return tuple(map(_detached, result))
    return alias(result) if isinstance(result, Tensor) else result


def _version(result: Any) -> int:
    """How often the tensors of a result were changed in place."""
    if isinstance(result, tuple):
        return sum(map(_version, result))
    return result._version if isinstance(result, Tensor) else 0
