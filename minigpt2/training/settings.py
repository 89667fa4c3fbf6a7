"""The settings of a run: what they are, what they are where none are given, and which may change in the middle."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from minigpt2.command_line import ATTENTIONS, RECOMPUTES, optional
from minigpt2.data.batches import Corpus
from minigpt2.data.documents import TextOptions, check_options
from minigpt2.device import pick_device
from minigpt2.training.metrics import check_trackers
from minigpt2.training.optimizer import muon_pays

__all__ = ["SHAPE", "TrainConfig", "changes", "chosen", "command", "flag"]

SHAPE = ("n_layer", "n_head", "n_embd")

# What is taken where nothing is given.
FROM_SCRATCH: dict[str, Any] = {"n_layer": 6, "n_head": 6, "n_embd": 192, "dropout": 0.0, "length": 256}
# A rate that is right for new weights can undo good ones before it improves them. Measured with 4 blocks of width 128
# after 200 steps on Python's sources, then on Shakespeare, 40 steps of 8 x 128 tokens, warm-up 10, no decay:
# from 8.60, 1e-4 came to 7.91, 3e-4 to 7.41 and 2e-3 to 6.04, all of them better at every validation. Such distant text
# wants the higher rates; the lowest is taken because weights of OpenAI, and text near what a model knows, do not.
# Muon's steps have a size of their own: 4 blocks of width 96 after 250 steps on Python's sources, then 40 steps of 8 x
# 128 tokens of Shakespeare, or of the sources: AdamW at 1e-4 came to 5.73 and 2.675, Muon at 1e-3 to 5.97 and 2.673, at
# 5e-3 to 5.67 and 2.668, with 1e-4 for the embeddings. AdamW is the default all the same, since it is faster and came
# further at higher rates: at 1e-3 to 5.27, Muon at 0.02 to 5.52 (`minigpt2 bench learning --init`, one seed).
FINE_TUNING: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-4, "embedding_lr": 1e-4, "warmup": 10}
FINE_TUNING |= {"weight_decay": 0.0}

# What a run never changes, with the reason, which is also what the message says.
_SHAPE = "the model has its shape"
_ORDER = "the order in which the run reads its tokens follows from it"
FIXED = dict.fromkeys(SHAPE, _SHAPE) | {"length": _ORDER, "seed": _ORDER, "optimizer": "its moments belong to it"}
FIXED["moments"] = "its snapshots have them so"
# What is about one start of the program, not about the run; --data and --init are compared by what they hold.
APART = {"out", "resume", "new_data", "data", "init"}
# What decides the tokens of a text, and changes with it alone.
OF_TEXT = {"separator", "encoding", "field"}


@dataclass(frozen=True)
class TrainConfig(TextOptions):
    """Train a GPT-2 from scratch, or fine-tune one with --init.
    $ minigpt2 train --data texts/ --out runs/first
    $ minigpt2 train --data texts/ --init gpt2 --out runs/tuned"""

    data: Annotated[Path | None, optional("PATH")] = None
    """Text, JSON lines or Parquet, plain or compressed, in a file, a folder of files or a pipe; or a folder of tokens
    from `minigpt2 prepare`. Default: the Python standard library's own sources."""
    out: Annotated[Path | None, optional("FOLDER")] = None
    """Run folder, which must not hold a run yet unless --resume is given. Default: a new folder under runs/, named by
    the time."""
    resume: bool = False
    """Continue the run in --out from its newest intact snapshot, with the settings that it had and those given now;
    begin it if there is none yet. So the same command may be started again and again."""
    new_data: bool = False
    """With --resume: go on with what --data holds now, though it is not what the run has read, from a new epoch."""
    snapshot_every: int = 100
    """Steps between snapshots; there is one before the first step and one at the end. 0: only when a signal comes."""
    keep: int = 2
    """Snapshots to keep: the newest."""
    init: Annotated[str | None, optional("MODEL")] = None
    """Start from these weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME on the hub, or a folder: of weights,
    of a run, finished or not, or of a snapshot. Default: a fresh model."""
    n_layer: Annotated[int | None, optional("INT")] = None
    """Blocks of a fresh model. Default: 6."""
    n_head: Annotated[int | None, optional("INT")] = None
    """Attention heads of a fresh model. Default: 6."""
    n_embd: Annotated[int | None, optional("INT")] = None
    """Width of a fresh model. Default: 192."""
    dropout: Annotated[float | None, optional("FLOAT")] = None
    """All three dropouts: embedding, residual, attention. OpenAI trained with 0.1. Default: 0; with --init, those
    of its config.json."""
    batch: int = 8
    """Sequences in a micro-batch, shared evenly by the processes."""
    length: Annotated[int | None, optional("INT")] = None
    """Tokens in a sequence; also the context length of a fresh model. Default: 256; with --init, its context length, or
    what the data has."""
    accumulate: int = 1
    """Micro-batches in a step, which has the gradients of one batch n times as large."""
    max_steps: int = 150
    """Optimizer steps."""
    optimizer: Annotated[Literal["adamw", "muon"] | None, optional("{adamw,muon}")] = None
    """muon is for the blocks' matrices, and leaves the rest to AdamW. Default: muon where PyTorch has it (since 2.9)
    and the processor or GPU multiplies bfloat16; else, with --init, with --moments in less and with fsdp, adamw."""
    lr: Annotated[float | None, optional("FLOAT")] = None
    """Peak learning rate of the blocks' matrices; a cosine brings it down to a tenth. Default: for muon
    0.02 * sqrt(192 / width); for adamw 0.192 / width, times sqrt(384 / width) beyond a width of 384, and
    times sqrt(tokens / 2048) where a step has fewer tokens; with --init 5e-3 and 1e-4."""
    embedding_lr: Annotated[float | None, optional("FLOAT")] = None
    """Peak learning rate of embeddings, biases and LayerNorms. Default: 6e-3 for muon; 3e-3 for adamw, times
    384 / width beyond a width of 384; for adamw with --lr the same as the matrices'; with --init 1e-4."""
    warmup: Annotated[int | None, optional("INT")] = None
    """Steps of linear warm-up to the peak learning rates. Default: a tenth of all steps; for adamw 30 at least, or
    three tenths; with --init 10."""
    weight_decay: Annotated[float | None, optional("FLOAT")] = None
    """Decay of matrices and embeddings. Default: 0.1; with --init 0."""
    moments: Annotated[Literal["fp32", "bf16", "8bit"] | None, optional("{fp32,bf16,8bit}")] = None
    """What AdamW's two moments of a matrix are kept in, at 4, 2 or 1 bytes each. Default: fp32, or what --memory-budget
    allows."""
    clip: float = 1.0
    """Clip the norm of the gradient to this; 0 is off."""
    checkpoint_every: int = 0
    """Recomputation: 0 is off; k = 1..n_layer keeps one activation every k blocks and recomputes n_layer - k."""
    recompute: Annotated[str, RECOMPUTES] = "block"
    """What is kept beside the input of a segment: block, nothing; keep-attention, what attention gave; pointwise, in
    every block, recomputed or not, what cost a matrix product or attention, and nothing else."""
    memory_budget: Annotated[str | None, optional("AMOUNT")] = None
    """Choose --checkpoint-every, --recompute and --optimizer-in-backward: the fastest within, say, 4GiB of memory (on
    CUDA, of tensors); and with AdamW --moments, in less only where nothing else fits. auto: all that is free to this
    process, its control group's limit included. Default: all are as they are given."""
    optimizer_in_backward: bool = False
    """Move each parameter as soon as the backward pass has its gradient, and drop that: gradients are never all there.
    --clip is for each parameter by itself then. Not with --accumulate, --compile, fp16 or ddp."""
    tune_allocator: bool = True
    """Keep and pack the memory of CPU tensors (minigpt2/ops/allocator.py), instead of leaving it to the C library."""
    attention: Annotated[str, ATTENTIONS] = "auto"
    """Attention backend: auto, eager, sdpa or fused."""
    compile: bool = False
    """Compile the model's part of a training step with torch.compile; not with fsdp."""
    eval_every: int = 50
    """Steps between validations; there is one before the first step and one after the last in any case."""
    eval_batches: int = 8
    """Batches of a validation."""
    early_stop: int = 0
    """End the run when this many validations in a row have brought no better loss; 0 is off."""
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
        at_least |= dict.fromkeys(
            ("snapshot_every", "warmup", "seed", "weight_decay", "clip", "lr", "early_stop", "embedding_lr"), 0
        )
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                problems.append(f"{flag(name)} must be >= {least}, got {value}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            problems.append(f"--dropout must be in [0, 1), got {self.dropout}")
        if self.resume and self.out is None:
            problems.append("--resume needs --out, the folder of the run to continue")
        if self.new_data and not self.resume:
            problems.append("--new-data is for --resume: a run that begins takes --data as it is")
        shape = [flag(name) for name in SHAPE if getattr(self, name) is not None]
        if self.init is not None and shape:
            problems.append(f"--init brings its own shape; leave out {', '.join(shape)}")
        if self.memory_budget is not None and (self.checkpoint_every or self.recompute != "block"):
            problems.append("--memory-budget chooses --checkpoint-every and --recompute; give it without them")
        if problems := problems or check_trackers(self.to_json()):
            raise ValueError("; ".join(problems))
        check_options(self)

    def resolved(self) -> TrainConfig:
        """These settings, with those that were not given chosen: all but the `length` and the `dropout` of a run that
        has `init`, which follow from its weights."""
        if self.init is None:
            chosen = FROM_SCRATCH | self._recipe_from_scratch()
        else:
            same = {} if self.lr is None else {"embedding_lr": self.lr}
            chosen = FINE_TUNING | ({"lr": 5e-3} if self.optimizer == "muon" else same)
        return dataclasses.replace(self, **{k: v for k, v in chosen.items() if getattr(self, k) is None})

    def _recipe_from_scratch(self) -> dict[str, Any]:
        """How a fresh model is trained where nothing else is said.

        The rate of AdamW for the blocks' matrices falls with the width, as in Yang et al. 2022 (arXiv:2203.03466), and
        with the root of the tokens in a step, as in Malladi et al. 2022 (arXiv:2205.10287), below the 2048 that it was
        measured with; more were not, and raise it no further. That of Muon falls with the root of the width, which fits
        the best of five rates at five widths and has no other source. Those of embeddings and vectors stay up to
        a width of 384. Beyond it the rates of AdamW fall further, measured at one width, and without a source: at 12 x
        768, 40 steps of 8 x 256 tokens, seeds 0 and 1, the mean was 6.10, 6.14 without that for the matrices and 6.23
        without it for any; at 8 x 384 a lower one for the embeddings was worse. AdamW warms up for 30 steps, or three
        tenths of fewer than 100: of 100 at 8 x 384 that gave 5.45 where a tenth gave 5.62, of 40 at 12 x 768, with the
        higher rates, 6.17 where it gave 6.36, at 4 x 128 nothing (`bench learning --warmup`, one seed). At 6
        blocks of width 192, 300 steps of 8 x 256 tokens of Shakespeare, a validation loss of 4.98 came with AdamW and
        4.45 with Muon in 1.03 of the time (minigpt2/bench/README.md has the commands and the sweeps), and 4.52 with
        Muon and 3e-3 for the embeddings (one seed).
        """
        pays = self.parallel != "fsdp" and self.moments in (None, "fp32") and muon_pays(pick_device(self.device))
        optimizer = self.optimizer or ("muon" if pays else "adamw")
        width = self.n_embd or FROM_SCRATCH["n_embd"]
        tokens = self.batch * self.accumulate * (self.length or FROM_SCRATCH["length"])
        if optimizer == "muon":
            rates = 0.02 * math.sqrt(192 / width), 6e-3
        else:
            wide = max(1, width / 384)
            rates = 0.192 / width * math.sqrt(min(1, tokens / 2048) / wide), 3e-3 / wide
        lr, embedding_lr = (float(f"{rate:.3g}") for rate in rates)  # 0.0245, not 0.02449489742783178
        if optimizer == "adamw" and self.lr is not None:
            embedding_lr = self.lr
        least = min(30, self.max_steps * 3 // 10) if optimizer == "adamw" else 1
        warmup = max(1, least, self.max_steps // 10)
        recipe = {"optimizer": optimizer, "lr": lr, "embedding_lr": embedding_lr, "warmup": warmup}
        return recipe | {"weight_decay": 0.1}

    def recipe(self) -> dict[str, Any]:
        """What make_optimizer takes, of settings that are resolved."""
        names = ("lr", "embedding_lr", "weight_decay", "clip")
        recipe = {name: getattr(self, name) for name in names}
        recipe |= {"kind": self.optimizer, "betas": (0.9, 0.95), "in_backward": self.optimizer_in_backward}
        return recipe | {"moments": self.moments or "fp32"}

    @property
    def needing_all_gradients(self) -> list[str]:
        """Which of these settings, which are resolved, need all gradients of a step at once, and so can not be combined
        with --optimizer-in-backward."""
        needing = {
            f"--accumulate {self.accumulate}": self.accumulate > 1,
            "--compile": self.compile,
            "--precision fp16": self.precision == "fp16",
            "--parallel ddp": self.parallel == "ddp",
        }
        return [name for name, given in needing.items() if given]

    def with_length(self, most: int, corpus: Corpus) -> TrainConfig:
        """These settings with a length: where none was given, `most`, or what the data has for a batch and a
        validation."""
        there = min(most, len(corpus.validation) - 1, (len(corpus.train) - 1) // self.batch)
        return self if self.length is not None else dataclasses.replace(self, length=max(1, there))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def flag(name: str) -> str:
    """A setting as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def chosen(given: TrainConfig, config: TrainConfig) -> str:
    """Those settings that were not given, with what was chosen, in one line."""
    names = [
        name
        for name in FROM_SCRATCH | FINE_TUNING
        if getattr(given, name) is None and (config.init is None or name not in SHAPE)
    ]
    found = {name: getattr(config, name) for name in names}
    return ", ".join(f"{flag(n)} {'that of the weights' if value is None else value}" for n, value in found.items())


def changes(before: TrainConfig, now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What is otherwise than it was in a run, as name: (before, now). Raises ValueError, with what to do instead, if it
    cannot change."""
    names = [field.name for field in dataclasses.fields(now) if field.name not in APART | {"parallel"}]
    differ = {n: (getattr(before, n), getattr(now, n)) for n in names if getattr(before, n) != getattr(now, n)}
    problems = []
    for name, (old, new) in differ.items():
        if name in FIXED:
            problems.append(f"{flag(name)} {new} cannot change in a run, which has {old}: {FIXED[name]}")
        elif name in OF_TEXT and not now.new_data:
            problems.append(
                f"{flag(name)} {new} makes other tokens than the run's, with {old}: add --new-data for them"
            )
    if any(name in FIXED for name in differ):
        new_run = command("--init", before.out, "--out", "NEW")
        problems.append(f"leave that out, or begin a new run, from this one's weights ({new_run} ...) or from scratch")
    if problems:
        raise ValueError("; ".join(problems))
    return differ


def command(*settings: object, program: str | None = None) -> str:
    """A command line that can be pasted: this program, as it was started, or another verb of minigpt2, with
    `settings`."""
    if program is not None:
        words = ["minigpt2"] if shutil.which("minigpt2") else [_python(), "-m", "minigpt2"]
        words.append(program)
    elif sys.argv[0] == "minigpt2 train":  # see minigpt2/__main__.py
        words = ["minigpt2", "train"] if "-m" not in sys.orig_argv[:-1] else [_python(), "-m", "minigpt2", "train"]
    else:
        words = [_python(), sys.argv[0]]
    if program is None and "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
        if (nodes := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1":  # the same command on each
            start += ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:PORT"]
        words = words[words[0] == _python() :]
        words = [*start, *["-m"] * (words == ["minigpt2", "train"]), *words]
    return shlex.join([*words, *map(str, settings)])


def _python() -> str:
    """The interpreter by its name, if that finds it."""
    found = shutil.which("python")
    same = found is not None and Path(found).resolve() == Path(sys.executable).resolve()
    return "python" if same else sys.executable
