"""Train a GPT-2, or fine-tune one.

`python train.py` (`minigpt2 train` where minigpt2 is installed) trains a small model for about two minutes on 2 cores,
on the sources of Python's standard library; with `--help` it lists the settings.

A run folder holds the settings (train_config.json), the metrics of every step (metrics.jsonl, loss.png), snapshots of
everything that decides the future of the run (snapshots/), the weights of the best validation (best/) and, at the end,
the last ones. `python train.py --out FOLDER --resume` continues a run that stopped, whatever stopped it, as if it had
not; `torchrun --nproc-per-node N train.py ...` runs it on N processes.

Exit status: 0 done, 1 stopped by an error in the middle, 2 a mistake in the settings, 130 and 143 stopped by a signal
with a snapshot taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from minigpt2 import memory, tune_allocator
from minigpt2.command_line import complain, one_line_warnings, optional, parsed, replace_unprintable
from minigpt2.config import GPT2Config
from minigpt2.data.batches import Batches, Corpus, DataError, in_order, open_corpus
from minigpt2.device import resident_bytes
from minigpt2.files import atomic_write, removed_on_error
from minigpt2.generate import sample_text
from minigpt2.model import GPT2
from minigpt2.ops.attention import resolve_backend
from minigpt2.training import snapshot
from minigpt2.training.guards import NonFiniteError, stop_on_signals
from minigpt2.training.metrics import Metrics, Speedometer, Steps, check_trackers, plot_losses
from minigpt2.training.parallel import Processes, distribute, started
from minigpt2.training.precision import DTYPES, resolve_precision
from minigpt2.training.state import RunState, seed_of
from minigpt2.training.step import accumulate_gradients, culprit, mean_loss, save_weights
from minigpt2.training.vocabulary import tokenizer_of_run, vocabulary_of


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT-2 from scratch, or fine-tune one with --init.
    $ minigpt2 train --data texts/ --out runs/first
    $ minigpt2 train --data texts/ --init gpt2 --out runs/tuned"""

    data: Annotated[Path | None, optional("PATH")] = None
    """UTF-8 text: a file, or a folder of files; or token files from `minigpt2 prepare`. Default: the Python standard
    library's own sources."""
    out: Annotated[Path | None, optional("FOLDER")] = None
    """Run folder, which must not hold a run yet, or hold one with --resume. Default: a new folder under runs/, named by
    the time."""
    resume: bool = False
    """Continue the run in --out from its newest intact snapshot, with the settings that it had."""
    snapshot_every: int = 100
    """Steps between snapshots; there is one before the first step and one at the end. 0: only when a signal comes."""
    keep: int = 2
    """Snapshots to keep: the newest."""
    init: Annotated[str | None, optional("MODEL")] = None
    """Weights to start from: a folder, or a model of the hub (gpt2 to gpt2-xl, OWNER/NAME). Default: a fresh model."""
    n_layer: int = 6
    """Blocks of a fresh model."""
    n_head: int = 6
    """Attention heads of a fresh model."""
    n_embd: int = 192
    """Width of a fresh model."""
    dropout: float = 0.0
    """All three dropouts: embedding, residual, attention. OpenAI trained with 0.1."""
    batch: int = 8
    """Sequences in a micro-batch, shared evenly by the processes."""
    length: int = 256
    """Tokens in a sequence; also the context length of a fresh model."""
    accumulate: int = 1
    """Micro-batches in a step, which has the gradients of one batch n times as large."""
    max_steps: int = 150
    """Optimizer steps."""
    lr: float = 2e-3
    """Peak learning rate; a cosine brings it down to a tenth."""
    warmup: int = 10
    """Steps of linear warm-up to the peak learning rate."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    clip: float = 1.0
    """Clip the norm of the gradient to this; 0 is off."""
    checkpoint_every: int = 0
    """Recomputation: 0 is off; k = 1..n_layer keeps one activation every k blocks and recomputes n_layer - k."""
    recompute: str = "block"
    """What a recomputed block keeps: block, keep-attention or pointwise."""
    memory_budget: Annotated[str | None, optional("AMOUNT")] = None
    """Choose the two settings above: the fastest within, say, 4GiB of memory (on CUDA, of tensors); auto: all that is
    free to this process, its control group's limit included. Default: the two are as they are given."""
    tune_allocator: bool = True
    """Keep and pack the memory of CPU tensors (minigpt2/ops/allocator.py), instead of leaving it to the C library."""
    attention: str = "auto"
    """Attention backend: auto, eager, sdpa or fused."""
    compile: bool = False
    """Compile the model's part of a training step with torch.compile; not with fsdp."""
    eval_every: int = 50
    """Steps between validations; there is one before the first step and one after the last in any case."""
    eval_batches: int = 8
    """Batches of a validation."""
    seed: int = 0
    """Decides initial weights, dropout and the order of the data."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto: the best there is."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """What products are computed in (auto: the fastest here); weights and sums stay float32. fp16 scales the loss."""
    parallel: Annotated[Literal["ddp", "fsdp"] | None, optional("{ddp,fsdp}")] = None
    """What torchrun's processes share: ddp, the work; fsdp, also weights, gradients and optimizer. Default: ddp."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or gradient that is not finite: stop, with a snapshot from before, or skip the step."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, in the run folder's tb/. Needs pip install 'minigpt2[tensorboard]'."""
    wandb: bool = False
    """Show the metrics on Weights & Biases too, project $WANDB_PROJECT. Needs pip install 'minigpt2[wandb]'."""

    def check(self) -> None:
        """Raise ValueError with every setting that is out of range."""
        problems = []
        at_least = dict.fromkeys(("n_layer", "n_head", "n_embd", "batch", "length", "accumulate", "max_steps"), 1)
        at_least |= dict.fromkeys(("eval_every", "eval_batches", "keep"), 1)
        at_least |= dict.fromkeys(("snapshot_every", "warmup", "seed", "weight_decay", "clip", "lr"), 0)
        for name, least in at_least.items():
            value = getattr(self, name)
            if not least <= value < math.inf:
                problems.append(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
        if not 0 <= self.dropout < 1:
            problems.append(f"--dropout must be in [0, 1), got {self.dropout}")
        if self.resume and self.out is None:
            problems.append("--resume needs --out, the folder of the run to continue")
        if self.memory_budget is not None and (self.checkpoint_every or self.recompute != "block"):
            problems.append("--memory-budget chooses --checkpoint-every and --recompute; give it alone")
        if problems := problems or check_trackers(self.to_json()):
            raise ValueError("; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


# Settings that may change when a run is resumed: they are about its surroundings or, like recomputation, change how its
# numbers are computed but not the numbers. All others must stay; compile is among those, since it changes rounding.
MAY_CHANGE = {"out", "resume", "snapshot_every", "keep", "on_nonfinite", "tensorboard", "wandb", "device", "parallel"}
MAY_CHANGE |= {"checkpoint_every", "recompute", "memory_budget", "tune_allocator"}
SETTINGS = "train_config.json"


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine from lr to lr / 10 at the last step. `step` counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.max_steps - 1 - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_model(config: TrainConfig, device: torch.device) -> GPT2:
    """The model to train, in training mode on its device."""
    baseline = resident_bytes() if device.type == "cpu" else 0
    dropout: dict[str, Any] = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), config.dropout)
    options: dict[str, Any] = {name: getattr(config, name) for name in ("checkpoint_every", "recompute", "attention")}
    if config.init is not None:
        model = GPT2.from_pretrained(config.init, **options, **dropout)
    else:
        shape: dict[str, Any] = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
        shape |= vocabulary_of(config.data)
        model = GPT2(GPT2Config(n_positions=config.length, **shape, **dropout), **options)
    if config.length > model.config.n_positions:
        raise ValueError(f"--length {config.length} exceeds the model's context length {model.config.n_positions}")
    if config.memory_budget is not None:
        step, limit = (config.batch, config.length), memory.parse_budget(config.memory_budget, device.type)
        more: dict[str, Any] = {"accumulate": config.accumulate, "device": device.type, "precision": config.precision}
        notch = memory.fastest_that_fits(memory.notches(model.config, *step, **more), limit, baseline)
        model.checkpoint_every, model.recompute = notch.checkpoint_every, notch.recompute
        print(f"{notch.dials}:", memory.format_bytes(notch.peak + baseline), "expected of", memory.format_bytes(limit))
    resolve_backend(config.attention, device.type, DTYPES[config.precision], model.config.head_dim)  # or raise
    return model.to(device).train()


def make_optimizer(model: GPT2, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices (weights and embeddings) and leaves biases and LayerNorms alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


class Trainer(RunState):
    """The state of a run, and the step that moves it on."""

    def __init__(self, config: TrainConfig, model: GPT2, corpus: Corpus, processes: Processes) -> None:
        self.config, self.validation = config, corpus.validation
        self.network = distribute(model, config.parallel, processes, compile=config.compile)
        optimizer = make_optimizer(model, config)
        scaler = torch.amp.GradScaler(processes.device.type, enabled=config.precision == "fp16")
        batches = Batches(corpus.train, config.batch, config.length, config.seed, processes.rank, processes.world)
        super().__init__(model, optimizer, scaler, batches, processes, config.to_json())

    def advance(self) -> dict[str, Any]:
        """One optimizer step. Returns its row of metrics; raises NonFiniteError, with everything as before the step."""
        lr = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        position, random_state = self.batches.position, snapshot.random_state(self.device)
        micro_batches = [next(self.batches) for _ in range(self.config.accumulate)]
        step = (self.network, micro_batches, self.processes, self.config.precision, self.scaler)
        mean, count = accumulate_gradients(*step)
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        self.batches.prepare(self.config.accumulate)
        loss, norm = torch.stack([mean, snapshot.full_tensor(grad_norm).to(mean)]).tolist()  # waits for the device
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        elif math.isfinite(loss) and self.scaler.get_scale() > 1:
            self.say(f"step {self.step + 1}: a gradient overflowed in fp16; step skipped, loss scale halved")
        else:
            snapshot.set_random_state(random_state, self.device)
            message = f"step {self.step + 1}: the loss is {loss}, the norm of the gradient {norm}; "
            message += culprit(self.model, *step)
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
        row = {"step": self.step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": self.tokens}
        return row if finite else row | {"skipped": True}

    def validate(self) -> float:
        """Mean loss over the same validation windows each time. Draws no random numbers."""
        batches = in_order(self.validation, self.config.batch, self.config.length, self.config.eval_batches)
        self.val_loss = mean_loss(self.network, batches, self.processes, self.config.precision)
        return self.val_loss


def train(trainer: Trainer, out: Path) -> int:
    """The loop: step, validate, log, snapshot. Returns 0, or the exit status of the signal that ended it."""
    config, processes = trainer.config, trainer.processes
    speedometer = Speedometer(trainer.model.config, config.length, processes, DTYPES[config.precision])
    first = {}
    if trainer.step == 0:
        first["val_loss_before"] = trainer.best = trainer.validate()
        trainer.say(f"validation loss before training: {trainer.val_loss:.4f}")
        if config.snapshot_every:
            trainer.save(out / "snapshots", config.keep)
    with (
        Metrics(out, trainer.step, config.to_json(), writes=processes.main) as metrics,
        Steps(total=config.max_steps, initial=trainer.step, disable=not processes.main) as bar,
        stop_on_signals() as stop,
    ):
        while trainer.step < config.max_steps:
            began, tokens = time.perf_counter(), trainer.tokens
            try:
                row = trainer.advance()
            except NonFiniteError as error:
                trainer.save(out / "snapshots", config.keep)
                raise NonFiniteError(f"{error}; there is a snapshot from before, of step {trainer.step}") from None
            row |= {"seconds": metrics.seconds} | (first if trainer.step == 1 else {})
            row |= speedometer.row(trainer.tokens - tokens, time.perf_counter() - began)
            if trainer.step % config.eval_every == 0 or trainer.step == config.max_steps:
                row["val_loss"] = trainer.validate()
                trainer.say(f"step {trainer.step}: validation loss {trainer.val_loss:.4f}")
                if trainer.val_loss < trainer.best:
                    trainer.best = trainer.val_loss
                    save_weights(trainer.model, out / "best", processes, trainer.tokenizer)
            metrics.write(row)
            signal = processes.highest(stop.signal)
            due = config.snapshot_every and trainer.step % config.snapshot_every == 0
            if due or signal or (config.snapshot_every and trainer.step == config.max_steps):
                metrics.flush()  # a snapshot never has more steps than the metrics
                trainer.save(out / "snapshots", config.keep)
            bar.show(row, trainer.val_loss)
            if signal and trainer.step < config.max_steps:
                trainer.say(f"stopped after step {trainer.step}, with a snapshot; go on with: --out {out} --resume")
                return 128 + signal
        bar.finish()
    return 0


def read_settings() -> TrainConfig:
    """The settings of the command line; those of a resumed run are what they were unless they are given again."""
    config = parsed(lambda: tyro.cli(TrainConfig))
    if not config.resume or config.out is None:
        return config
    path = config.out / SETTINGS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored.pop("tokenizer", None)
        data = None if stored["data"] is None else Path(stored["data"])
        default = TrainConfig(**stored | {"parallel": None, "out": config.out, "data": data})
    except FileNotFoundError:
        raise ValueError(f"--resume: {config.out} holds no run") from None
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not the settings of a run: {error}") from None
    return parsed(lambda: tyro.cli(TrainConfig, default=default))


def set_up(config: TrainConfig, processes: Processes) -> tuple[Trainer, Path]:
    """The trainer, where it starts or where its newest snapshot left it, and its run folder."""
    if config.parallel and not processes.torchrun:
        raise ValueError(f"--parallel {config.parallel} needs torchrun --nproc-per-node N -m minigpt2 train ...")
    config = dataclasses.replace(config, parallel=config.parallel or ("ddp" if processes.torchrun else None))
    config = dataclasses.replace(config, precision=resolve_precision(config.precision, processes.device))
    out = config.out or Path(processes.gather(time.strftime("runs/%Y%m%d-%H%M%S"))[0])
    if not config.resume and ((out / SETTINGS).exists() or (out / "metrics.jsonl").exists()):
        raise ValueError(f"--out {out} already holds a run; continue it with --resume, or choose another folder")
    if config.tune_allocator and processes.device.type == "cpu":
        said = tune_allocator()
        if processes.main:
            print(said)
    torch.manual_seed(config.seed)
    model = make_model(config, processes.device)
    tokenizer = tokenizer_of_run(config.init, config.data, model.config.vocab_size, out if config.resume else None)
    with removed_on_error(out) if processes.main else nullcontext():
        if processes.main:
            open_corpus(config.data, out / "tokens", tokenizer=tokenizer, progress=True)
        processes.wait()
        corpus = open_corpus(config.data, out / "tokens", tokenizer=tokenizer)
        if len(corpus.validation) <= config.length:
            raise DataError(f"{len(corpus.validation)} validation tokens are too few for one window of {config.length}")
        trainer = Trainer(config, model, corpus, processes)
        trainer.tokenizer = tokenizer
    if processes.rank:  # process 0 goes on with the state that made the weights, as a single process does
        torch.manual_seed(seed_of(config.seed, 0, processes.rank))
    if config.resume:
        trainer.say("\n".join(trainer.resume(out / "snapshots", MAY_CHANGE)))
    if processes.main:
        out.mkdir(parents=True, exist_ok=True)
        trainer.save_tokenizer(out)
        with atomic_write(out / SETTINGS) as path:
            settings = config.to_json() | {"out": str(out), "resume": False, "tokenizer": trainer.made_by}
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    processes.wait()
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    many = (f" x {processes.world} ({config.parallel})" if processes.world > 1 else "") + f", {config.precision}"
    source = config.data or "the Python standard library's own sources"
    trainer.say(f"{size} on {processes.device}{many}, attention {config.attention}, run folder {out}")
    trainer.say(f"{len(corpus.train):,} training and {len(corpus.validation):,} validation tokens from {source}")
    return trainer, out


def finish(trainer: Trainer, out: Path) -> None:
    """Write the last weights and the loss curve, and show some text."""
    model = save_weights(trainer.model, out, trainer.processes, trainer.tokenizer)
    if not trainer.processes.main:
        return
    print(f"saved {out}/model.safetensors; continue it with: minigpt2 generate --model {out} --prompt 'import '")
    first = "those it began with: no validation was better than the first"
    best = f"in {out}/best" if (out / "best").exists() else first
    print(f"the weights of the best validation loss, {trainer.best:.4f}, are {best}")
    print(plot_losses(out))
    if trainer.tokenizer is not None:
        print("a sample of its text:\n" + sample_text(model.eval(), trainer.tokenizer, 120, trainer.config.seed))


def run(config: TrainConfig, processes: Processes) -> int:
    """One run, or the rest of one; returns the exit status."""
    try:
        trainer, out = set_up(config, processes)
    except (ValueError, OSError, RuntimeError) as error:  # everything the user can mend
        return complain(error, 2)
    except KeyboardInterrupt:
        return 130
    try:
        status = train(trainer, out)
        if status == 0:
            finish(trainer, out)
        return status
    except (NonFiniteError, snapshot.SnapshotError, OSError) as error:  # any other is a bug and shows its trace
        return complain(error, 1)


def main() -> int:
    replace_unprintable()
    with ExitStack() as stack:
        stack.enter_context(one_line_warnings(Path(sys.argv[0]).name))
        try:
            config = read_settings()
            config.check()
            processes = stack.enter_context(started(config.device))
        except (ValueError, OSError) as error:
            return complain(error, 2)
        return processes.ended(run(config, processes))


if __name__ == "__main__":
    sys.exit(main())
