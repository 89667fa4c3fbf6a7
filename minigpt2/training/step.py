"""The parts of a training step that know nothing of settings: gradients of many micro-batches as of one, in any
precision, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt2.device import to_device
from minigpt2.model import GPT2
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.guards import first_nonfinite
from minigpt2.training.parallel import Processes, unsynchronised
from minigpt2.training.precision import autocast
from minigpt2.training.snapshot import weight_tensors

__all__ = ["accumulate_gradients", "culprit", "mean_loss", "save_weights"]

Batch = tuple[Tensor, Tensor]


def accumulate_gradients(
    network: nn.Module,
    micro_batches: list[Batch],
    processes: Processes,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, int]:
    """Accumulate the gradients of one mean: that of the loss over all targets that are not -100, in all micro-batches
    of all processes. Returns that mean, in nats, and the number of targets.

    `network` comes from parallel.distribute; each micro-batch is (input_ids, targets), (B, T) each, on the CPU. The
    mean is a scalar tensor on the processes' device, which nothing here waits for.
    """
    counts = torch.stack([(targets != -100).sum() for _, targets in micro_batches])
    count = max(1, int(processes.sum(counts.sum())))
    device = processes.device
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for i, (input_ids, targets) in enumerate(micro_batches):
        last = i + 1 == len(micro_batches)
        with nullcontext() if last else unsynchronised(network):
            with autocast(device, precision):
                loss = network(to_device(input_ids, device), to_device(targets, device))
            # The engines take the mean over processes; the loss is a sum over them.
            mean = loss * (processes.world / count)
            (mean if scaler is None else scaler.scale(mean)).backward()
        total += loss.detach()
    return processes.sum(total) / count, count


def culprit(
    model: GPT2,
    network: nn.Module,
    micro_batches: list[Batch],
    processes: Processes,
    precision: str,
    scaler: torch.amp.GradScaler,
) -> str:
    """Run a bad step again, check every tensor, and say which module made the first that is not finite. Leaves the
    gradients of that run, and draws the random numbers of the step."""
    model.zero_grad()
    # Eager, since hooks that read values cannot be compiled.
    with torch.compiler.set_stance("force_eager"), first_nonfinite(model) as found:
        accumulate_gradients(network, micro_batches, processes, precision, scaler)
    for rank, names in enumerate(processes.gather(found[:1])):
        if names:
            where = f", on process {rank}" if processes.world > 1 else ""
            return f"{names[0]} is the first that is not finite{where}"
    return "no module's own output or gradient is to blame"


@torch.no_grad()
def mean_loss(network: nn.Module, batches: Iterable[Batch], processes: Processes, precision: str) -> float:
    """Mean over the targets of all batches, in nats, in evaluation mode; each process takes its rows. Draws no random
    numbers."""
    rank, world, device = processes.rank, processes.world, processes.device
    network.eval()
    losses, count = [], 0
    for input_ids, targets in batches:
        more = -len(input_ids) % world  # rows without targets, so that each process has as many
        x = torch.cat([input_ids, input_ids[:1].expand(more, -1)])[rank::world]
        y = F.pad(targets, (0, 0, 0, more), value=-100)[rank::world]
        with autocast(device, precision):
            losses.append(network(to_device(x, device), to_device(y, device)))
        count += int((y != -100).sum())
    if reshard := getattr(network, "reshard", None):  # FSDP2's
        reshard()  # a forward pass leaves the outermost group gathered, for the backward pass that did not come
    network.train()
    own = [sum(torch.stack(losses).tolist()), count]
    loss_sum, count = processes.sum(torch.tensor(own, dtype=torch.float64)).tolist()
    return loss_sum / count


def save_weights(model: GPT2, folder: Path, processes: Processes, tokenizer: Tokenizer | None) -> GPT2:
    """Let the main process write the weights, gathered if they are sharded, and the tokenizer. Returns a model that has
    them there; on the other processes it has none."""
    if processes.torchrun:
        tensors = weight_tensors(model, keep=processes.main)
        with torch.device("meta"):
            model = GPT2(model.config)
        model.load_state_dict(tensors, assign=True, strict=processes.main)
    if processes.main:
        model.save_pretrained(folder, tokenizer)
    return model
