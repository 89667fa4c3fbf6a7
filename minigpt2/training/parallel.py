"""One step on many processes: which does what, with DDP and FSDP2 of PyTorch.

The processes share each micro-batch evenly, so a run means the same on any number of them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from minigpt2.device import pick_device
from minigpt2.model import GPT2
from minigpt2.ops import kernel

__all__ = [
    "LossSum",
    "Processes",
    "compiled",
    "distribute",
    "fsdp_unavailable",
    "started",
    "torchrun",
    "unsynchronised",
]


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them. Every process must make the same calls in the same order."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    torchrun: bool = False
    """Whether torchrun started them; there may be one all the same."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def highest(self, value: int) -> int:
        """The highest of the processes' values."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, by rank."""
        if self.world == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = self.highest(len(mine))
        padded = torch.full((length,), ord(" "), dtype=torch.uint8)
        padded[: len(mine)] = mine
        all_of_them = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(all_of_them, padded)
        return [json.loads(t.numpy().tobytes()) for t in all_of_them]

    def ended(self, status: int) -> int:
        """Return the exit status, unless it is not 0 and torchrun started this process, which then ends at once: in an
        orderly end it could wait for others that wait for it. Torchrun ends the others."""
        if status and self.torchrun:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    def wait(self) -> None:
        """Wait until every process is here."""
        self.highest(0)


def torchrun() -> bool:
    """Whether torchrun started this process."""
    return os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE"}


@contextmanager
def started(device: str) -> Iterator[Processes]:
    """This process among those that torchrun started, or alone. Raises ValueError for a device that is not there."""
    if not torchrun():
        yield Processes(device=pick_device(device))
        return
    rank, local, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    picked = pick_device(device)
    if picked.type == "mps":
        raise ValueError("many processes cannot share an MPS device; use --device cpu")
    if picked.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun started process {local + 1} here, for {torch.cuda.device_count()} GPUs")
        picked = torch.device("cuda", local)
        torch.cuda.set_device(picked)
    # Values on the CPU, such as whether to stop, travel by gloo even where the gradients go by NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world, picked, torchrun=True)
    except BaseException:
        traceback.print_exc()
        Processes(torchrun=True).ended(1)
    # The destructor of the process group waits for threads that may wait for Python's lock, which DDP holds when it
    # releases the group: it must not be the last to do so.
    gc.collect()
    dist.destroy_process_group()


class LossSum(nn.Module):
    """The sum of the losses of a batch as a forward pass, which is what DDP and FSDP2 wrap. With `compile` it is
    compiled in training mode; the model itself and the names of its parameters stay as they are."""

    def __init__(self, model: GPT2, *, compile: bool = False) -> None:
        super().__init__()
        self.model = model
        self.training_loss = compiled(model.loss) if compile else model.loss

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        # Evaluation is too small a part of the work to be compiled once more.
        loss = self.training_loss if self.training else self.model.loss
        return loss(input_ids, targets, reduction="sum")


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function compiled by torch.compile as one graph, once for each shape; RuntimeError if that fails. It draws
    the random numbers that the function draws, and gives the same results but for rounding."""
    # Inductor's own random generator would drop other elements.
    return torch.compile(function, fullgraph=True, dynamic=False, options={"fallback_random": True})


def fsdp_unavailable(device: torch.device) -> str | None:
    """Why FSDP2 cannot run on a device here, or None if it can."""
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        return f"--parallel fsdp on a CPU needs a newer torch than {torch.__version__}; ddp does not"
    return None


def distribute(
    model: GPT2, mode: Literal["ddp", "fsdp"] | None, processes: Processes, *, compile: bool = False
) -> nn.Module:
    """A LossSum of the model whose gradients are the mean over processes. `model`, which must be the same everywhere,
    keeps its names; with fsdp its parameters become shards (DTensors), a group for each block. Raises ValueError where
    fsdp cannot work; and where `compile` cannot: with fsdp, whose hooks at each block do not fit into one graph, and
    without a C++ compiler."""
    if mode == "fsdp" and (reason := fsdp_unavailable(processes.device)):
        raise ValueError(reason)
    if compile and mode == "fsdp":
        raise ValueError("--compile cannot be combined with --parallel fsdp")
    if compile and processes.device.type == "cpu" and (reason := kernel.unavailable()):
        raise ValueError(f"--compile needs a C++ compiler: {reason}")
    network: nn.Module = LossSum(model, compile=compile)
    if mode == "ddp":
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard  # see shards.py

        mesh = init_device_mesh(processes.device.type, (processes.world,))
        for block in model.h:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
    return network


def unsynchronised(network: nn.Module) -> AbstractContextManager[None]:
    """Inside, DDP only accumulates its gradients; the next backward pass outside exchanges them all. FSDP2 goes on
    exchanging, since unsharded gradients would cost the memory that it is there to save."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
