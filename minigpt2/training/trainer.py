"""The state of a run and the step that moves it on: what train.py and `minigpt2 bench learning` train through."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt2 import memory
from minigpt2.config import GPT2Config
from minigpt2.data.batches import Batches, Corpus, in_order
from minigpt2.device import resident_bytes
from minigpt2.frontier import fastest_that_fits, notches
from minigpt2.model import GPT2
from minigpt2.ops.attention import resolve_backend
from minigpt2.training import snapshot
from minigpt2.training.guards import NonFiniteError
from minigpt2.training.optimizer import make_optimizer
from minigpt2.training.parallel import Processes, distribute
from minigpt2.training.precision import DTYPES
from minigpt2.training.settings import SHAPE, TrainConfig
from minigpt2.training.state import RunState
from minigpt2.training.step import accumulate_gradients, culprit, mean_loss
from minigpt2.training.vocabulary import vocabulary_of

__all__ = ["Trainer", "make_model", "schedule"]


def schedule(step: int, warmup: int, max_steps: int) -> float:
    """What part of its peak a rate has: linear warm-up to 1, then half a cosine down to 0.1 at the last step. `step`
    counts from 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - 1 - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_model(config: TrainConfig, processes: Processes, saved: Path | None = None) -> tuple[GPT2, TrainConfig]:
    """The model to train, in training mode on its device: a fresh one, that of --init, or one of the shape that the
    config.json of a snapshot, `saved`, says. And the settings, with how the optimizer steps if --memory-budget chose
    it. Every process must call this."""
    device = processes.device
    if config.optimizer_in_backward and (found := config.needing_all_gradients):
        raise ValueError(f"--optimizer-in-backward cannot be combined with {', '.join(found)}")
    if config.compile:
        torch.compiler.reset()  # which imports the compiler, for the next line to count
    if config.parallel == "fsdp":
        importlib.import_module("torch.distributed.fsdp")
    baseline = resident_bytes() if device.type == "cpu" else 0
    if config.memory_budget is None or saved is not None:  # a run keeps the moments that it began with
        config = dataclasses.replace(config, moments=config.moments or "fp32")
    options: dict[str, Any] = {name: getattr(config, name) for name in ("checkpoint_every", "recompute", "attention")}
    dropout: dict[str, Any] = {}
    if config.dropout is not None:
        dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), config.dropout)
    if saved is not None:
        model = GPT2(GPT2Config.from_file(saved / "config.json", **dropout), **options)
    elif config.init is not None:
        model = GPT2.from_pretrained(config.init, **options, **dropout)
        for parameter in model.parameters():  # the alignment of a mapped file would decide the rounding of some kernels
            parameter.data = parameter.data.clone()
    else:
        shape: dict[str, Any] = {name: getattr(config, name) for name in SHAPE} | {"n_positions": config.length}
        model = GPT2(GPT2Config(**shape, **vocabulary_of(config.data), **dropout), **options)
    length = config.length or model.config.n_positions
    if length > model.config.n_positions:
        raise ValueError(f"--length {length} exceeds the model's context length {model.config.n_positions}")
    if config.memory_budget is not None:
        notch = within_budget(config, model.config, length, processes, baseline)
        # Each process has its own memory, and all must take the same steps: those that fit everywhere.
        mine: list[Any] = [notch.peak, notch.checkpoint_every, notch.recompute, *notch.stepping]
        _, model.checkpoint_every, model.recompute, moments, inside = min(processes.gather(mine))
        config = dataclasses.replace(config, moments=moments, optimizer_in_backward=inside)
    resolve_backend(config.attention, device.type, DTYPES[config.precision], model.config.head_dim)  # or raise
    return model.to(device).train(), config


def within_budget(
    config: TrainConfig, shape: GPT2Config, length: int, processes: Processes, baseline: int
) -> memory.Footprint:
    """The notch that --memory-budget chooses for a model of that shape, in a process that holds `baseline` bytes. Of
    fsdp it does not count what sharding saves."""
    device = processes.device
    limit = memory.parse_budget(config.memory_budget or "auto", device)
    rows = -(-config.batch // processes.world)
    ways = memory.steppings(config.optimizer or "adamw", in_backward=not config.needing_all_gradients)
    ways = [way for way in ways if way.in_backward or not config.optimizer_in_backward]
    ways = [way for way in ways if config.moments in (None, way.moments)]
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("accumulate", "precision", "optimizer")}
    found = notches(shape, rows, length, ways, device=device.type, **settings)
    try:
        notch = fastest_that_fits(found, limit, baseline)
    except ValueError as error:
        if config.optimizer != "muon" or config.moments is not None:
            raise
        raise ValueError(f"{error}; --optimizer adamw, whose moments --moments can keep in less, may") from None
    if processes.main:
        print(f"{notch.dials}:", memory.format_bytes(notch.peak + baseline), "expected of", memory.format_bytes(limit))
    return notch


class Trainer(RunState):
    """The state of a run, and the step that moves it on."""

    def __init__(self, config: TrainConfig, model: GPT2, corpus: Corpus, processes: Processes) -> None:
        assert config.length is not None
        self.config, self.validation, self.length = config, corpus.validation, config.length
        self.network = distribute(model, config.parallel, processes, compile=config.compile)
        optimizer = make_optimizer(model, **config.recipe())
        scaler = torch.amp.GradScaler(processes.device.type, enabled=config.precision == "fp16")
        batches = Batches(corpus.train, config.batch, self.length, config.seed, processes.rank, processes.world)
        super().__init__(model, optimizer, scaler, batches, processes, config.to_json())

    def advance(self) -> dict[str, Any]:
        """One optimizer step. Returns its row of metrics; raises NonFiniteError, with everything as before the step but
        for what --optimizer-in-backward has moved by then."""
        if self.step == 0:
            self.optimizer.make_state()
        part = schedule(self.step, self.config.warmup or 0, self.config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * part
        position, random_state = self.batches.position, snapshot.random_state(self.device)
        micro_batches = [next(self.batches) for _ in range(self.config.accumulate)]
        step = (self.network, micro_batches, self.processes, self.config.precision, self.scaler)
        mean, count = accumulate_gradients(*step)
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]  # it reads the groups of parameters only
        grad_norm = self.optimizer.clip_gradients()
        self.batches.prepare(self.config.accumulate)
        loss, norm = torch.stack([mean, grad_norm.to(mean)]).tolist()  # waits for the device
        finite, clipped = math.isfinite(loss) and math.isfinite(norm), self.optimizer.clips(norm)
        if finite:
            self.optimizer.step()
        elif math.isfinite(loss) and self.scaler.get_scale() > 1:
            self.say(f"step {self.step + 1}: a gradient overflowed in fp16; step skipped, loss scale halved")
        else:
            snapshot.set_random_state(random_state, self.device)
            message = f"step {self.step + 1}: the loss is {loss}, the norm of the gradient {norm}; "
            message += culprit(self.model, *step)
            self.partly_moved = self.optimizer.moved > 0
            if self.partly_moved:
                message += f"; {self.optimizer.moved} parameters had moved by then, and the others have not"
            self.optimizer.zero_grad()
            if self.config.on_nonfinite == "stop":
                snapshot.set_random_state(random_state, self.device)
                self.batches.position = position
                raise NonFiniteError(message)
            self.say(f"{message}; step skipped")
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += count
        row = {
            "step": self.step,
            "loss": loss,
            "lr": (self.config.lr or 0) * part,
            "grad_norm": norm,
            "tokens": self.tokens,
        }
        if not finite:
            return row | {"skipped": True}
        return row | {"clipped": True} if clipped else row

    def validate(self, network: nn.Module | None = None) -> float:
        """Mean loss of the run's network, or of one that every process has whole, over the same validation windows each
        time. Draws no random numbers."""
        batches = in_order(self.validation, self.config.batch, self.length, self.config.eval_batches)
        if network is not None:
            return mean_loss(network, batches, Processes(device=self.device), self.config.precision)
        self.val_loss = mean_loss(self.network, batches, self.processes, self.config.precision)
        return self.val_loss

    def measure_best(self, weights: Path) -> None:
        """Take for the best loss that of these weights, if there are any, with the validation of now."""
        self.best, self.stale = math.inf, 0
        if weights.exists():
            best = GPT2.from_pretrained(weights, attention=self.config.attention).to(self.device)
            self.best = self.validate(distribute(best, None, self.processes))

    @property
    def stopped_early(self) -> bool:
        """Whether --early-stop ended the run."""
        return 0 < self.config.early_stop <= self.stale

    @property
    def ended(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.config.max_steps or self.stopped_early

    def what_goes_on(self) -> str:
        """What to give with --resume to a run that has ended."""
        if self.stopped_early:
            return f"a larger --early-stop than {self.stale}, or 0, goes on"
        return f"a larger --max-steps than {self.config.max_steps} goes on"
