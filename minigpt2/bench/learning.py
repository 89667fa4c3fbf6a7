"""What training learns: the loss over the steps and over the seconds, at several rates, beside transformers' model."""

from __future__ import annotations

import json as json_format
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt2.bench.header import header
from minigpt2.bench.worker import end_with
from minigpt2.command_line import optional
from minigpt2.data.batches import check_enough, is_token_folder, open_corpus
from minigpt2.device import pick_device
from minigpt2.extras import import_extra
from minigpt2.model import GPT2
from minigpt2.ops.allocator import tune_allocator
from minigpt2.progress import Progress
from minigpt2.training.guards import NonFiniteError, Norms
from minigpt2.training.precision import resolve_precision

if TYPE_CHECKING:
    from minigpt2.training.settings import TrainConfig

__all__ = ["Curve", "bench_learning"]


class Setting(NamedTuple):
    """What runs of several seeds have in common."""

    library: str
    optimizer: str | None
    lr: float | None
    embedding_lr: float | None

    def __str__(self) -> str:
        return f"{self.library}, {self.optimizer} {self.lr:g}, embeddings {self.embedding_lr:g}"


@dataclass
class Curve:
    """How one run learned."""

    setting: Setting
    seed: int
    loss: list[float] = field(default_factory=list)
    """Of each step; fewer than asked for where the next was not finite."""
    seconds: list[float] = field(default_factory=list)
    """From the beginning of the training to the end of each step, without the validations."""
    validation: dict[int, float] = field(default_factory=dict)
    """The loss by the steps before it; the last is infinite where the run stopped at a loss that was not finite."""
    jumps: int = 0
    """Steps after the warm-up whose gradient's norm was far above those before it; see guards.Norms."""


Curves = dict[Setting, list[Curve]]


def bench_learning(
    data: Annotated[Path | None, optional("PATH")] = None,
    *,
    init: Annotated[str | None, optional("MODEL")] = None,
    n_layer: Annotated[int | None, optional("INT")] = None,
    n_head: Annotated[int | None, optional("INT")] = None,
    n_embd: Annotated[int | None, optional("INT")] = None,
    length: Annotated[int | None, optional("INT")] = None,
    batch: int = 8,
    steps: int = 300,
    optimizer: Annotated[tuple[Literal["adamw", "muon"], ...] | None, optional("{adamw,muon} [...]")] = None,
    lr: Annotated[tuple[float, ...] | None, optional("FLOAT [FLOAT ...]")] = None,
    embedding_lr: Annotated[float | None, optional("FLOAT")] = None,
    warmup: Annotated[int | None, optional("INT")] = None,
    seeds: tuple[int, ...] = (0,),
    precision: Literal["fp32", "bf16", "auto"] = "fp32",
    eval_every: int = 50,
    compare: Annotated[Literal["hf"] | None, optional("{hf}")] = None,
    out: Annotated[Path | None, optional("OUT")] = None,
    json: bool = False,
) -> list[Curve]:
    """Measure what training learns: validation losses at several rates and seeds.
    $ minigpt2 bench learning --data tokens/ --optimizer adamw muon --lr 5e-4 1e-3 2e-3 --seeds 0 1

    Each run takes the steps of `minigpt2 train` with these settings, without dropout, in a process of its own, one
    after the other; validations do not count as its time. What is not given is what `minigpt2 train` chooses.

    Args:
        data: As in `minigpt2 train`. Default: the Python standard library's own sources.
        init: Weights to start from, as in `minigpt2 train`. Default: a fresh model.
        n_layer: Blocks of a fresh model.
        n_head: Attention heads of a fresh model.
        n_embd: Width of a fresh model.
        length: Tokens in a sequence.
        batch: Sequences in a step.
        steps: Steps of each run, to which the schedule is fitted.
        optimizer: Those to measure.
        lr: Peak learning rates of the blocks' matrices to measure.
        embedding_lr: Peak learning rate of embeddings, biases and LayerNorms.
        warmup: Steps of linear warm-up.
        seeds: Those to measure; a loss is the mean over them, with its range.
        precision: What matrix products are computed in, of both libraries.
        eval_every: Steps between validations.
        compare: Also train transformers' model, as installed, from the same weights on the same batches. Default: not.
        out: Draw OUT-steps.png and OUT-seconds.png, the losses over both. Default: no pictures.
        json: Print one JSON object, with the loss of every step, instead of the table.

    Returns:
        The curve of each run.
    """
    from minigpt2.training.settings import TrainConfig  # which is heavy to import, and --help needs nothing of it

    if out is not None:
        import_extra("plots", "matplotlib.figure", "--out")  # before hours of measuring
    if compare is not None:
        import_extra("parity", "transformers", "--compare hf")
    shape: dict[str, Any] = {"init": init, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "length": length}
    fixed: dict[str, Any] = {"batch": batch, "max_steps": steps, "warmup": warmup, "eval_every": eval_every}
    fixed |= {"data": data, "embedding_lr": embedding_lr, "dropout": 0.0, "precision": precision}
    configs = [
        TrainConfig(**shape, **fixed, optimizer=kind, lr=rate, seed=seed)
        for kind in optimizer or (None,)
        for rate in lr or (None,)
        for seed in seeds or (0,)
    ]
    with tempfile.TemporaryDirectory() as folder:
        place = data if data is not None and is_token_folder(data) else Path(folder)
        configs = [_prepared(config, place) for config in configs]
        curves: Curves = {}
        for config in configs:
            for library in ["minigpt2"] + ["transformers"] * (compare is not None):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with, (os.getpid(),)) as pool:
                    curve = pool.submit(_train, config, library, place).result()
                curves.setdefault(curve.setting, []).append(curve)
    found = [curve for of_setting in curves.values() for curve in of_setting]
    if json:
        print(json_format.dumps({"header": header("learning"), "runs": [_as_json(curve) for curve in found]}))
    else:
        _say(configs[0], curves)
    if out is not None:
        for over in ("steps", "seconds"):
            _draw(curves, over, out.with_name(f"{out.name}-{over}.png"))
    return found


def _prepared(config: TrainConfig, place: Path) -> TrainConfig:
    """The settings, complete, of a run that can take its steps; its tokens are made in `place` unless they are there.
    Raises ValueError for settings that do not fit, before anything runs."""
    from minigpt2.training.parallel import Processes
    from minigpt2.training.trainer import make_model
    from minigpt2.training.vocabulary import tokenizer_of_run

    config.check()
    device = pick_device(config.device)
    config = replace(config.resolved(), precision=resolve_precision(config.precision, device))
    model, config = make_model(config, Processes(device=device))
    tokenizer = tokenizer_of_run(config.init, config.data, model.config.vocab_size)
    corpus = open_corpus(config.data, place, tokenizer=tokenizer, progress=True)
    config = config.with_length(model.config.n_positions, corpus)
    check_enough(corpus, config.batch, config.length or 1)
    return config


class _Theirs(nn.Module):
    """transformers' GPT-2 with the weights of ours, for the trainer to take for ours."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        import transformers

        self.config = model.config
        settings: dict[str, Any] = model.config.to_dict() | {"attn_implementation": "sdpa", "use_cache": False}
        self.network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).train()
        self.network.transformer.load_state_dict(model.state_dict())

    @property
    def h(self) -> nn.Module:
        return self.network.transformer.h

    def loss(self, input_ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """What its own loss computes, without the shift."""
        logits = self.network(input_ids).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def _train(config: TrainConfig, library: str, place: Path) -> Curve:
    """Take all steps of a run in this process."""
    from minigpt2.training.parallel import Processes
    from minigpt2.training.trainer import Trainer, make_model

    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    model: Any = make_model(config, Processes(device=device))[0]
    if library == "transformers":
        model = _Theirs(model)
    elif device.type == "cpu":
        tune_allocator()
    trainer = Trainer(config, model, open_corpus(place, place), Processes(device=device))
    curve = Curve(Setting(library, config.optimizer, config.lr, config.embedding_lr), config.seed)
    curve.validation[0] = trainer.validate()
    norms, gone = Norms(), 0.0
    for _ in Progress(range(config.max_steps), desc=f"{curve.setting}, seed {curve.seed}"):
        start = time.perf_counter()
        try:
            row = trainer.advance()
        except NonFiniteError:
            curve.validation[trainer.step] = math.inf
            break
        gone += time.perf_counter() - start
        curve.loss.append(row["loss"])
        curve.seconds.append(gone)
        far = norms.far_above(row["grad_norm"]) is not None
        curve.jumps += far and trainer.step > (config.warmup or 0)
        if trainer.step % config.eval_every == 0 or trainer.step == config.max_steps:
            curve.validation[trainer.step] = trainer.validate()
    return curve


def _as_json(curve: Curve) -> dict[str, Any]:
    """A run as JSON values, which know no infinity."""
    finite = {step: loss if math.isfinite(loss) else None for step, loss in curve.validation.items()}
    return asdict(curve) | {"setting": curve.setting._asdict(), "validation": finite}


def _say(config: TrainConfig, curves: Curves) -> None:
    """Print the table: a row for each setting, with the means over its seeds."""
    source = config.data or "the Python standard library's own sources"
    shape = config.init or f"{config.n_layer} blocks of width {config.n_embd}"
    print(header("learning"))
    print(f"{shape}, {config.batch} x {config.length} tokens of {source}, {config.precision}, seeds ", end="")
    print(", ".join(str(curve.seed) for curve in next(iter(curves.values()))))
    every = range(config.eval_every, config.max_steps, config.eval_every)
    shown = [*every[:: max(1, -(-len(every) // 3))], config.max_steps]
    columns = " ".join(f"{step:>6}" for step in shown)
    print(f"{'validation loss after':<50} {columns} {'range':^14} {'s a step':>8}  jumps")
    for setting, found in curves.items():
        means = [statistics.fmean(curve.validation.get(step, math.inf) for curve in found) for step in shown]
        last = [list(curve.validation.values())[-1] for curve in found]
        step = statistics.fmean(curve.seconds[-1] / len(curve.seconds) for curve in found if curve.seconds)
        losses, jumps = " ".join(f"{mean:6.3f}" for mean in means), sum(curve.jumps for curve in found)
        print(f"{setting!s:<50} {losses} [{min(last):.3f}, {max(last):.3f}] {step:8.3f} {jumps:>6}")
    for setting, found in curves.items():
        peer = setting._replace(library="minigpt2")
        if peer != setting:
            pairs = list(zip(found, curves[peer], strict=True))
            largest = max(abs(a - b) for t, o in pairs for a, b in zip(t.loss, o.loss, strict=False))
            times = statistics.median(theirs.seconds[-1] / ours.seconds[-1] for theirs, ours in pairs)
            print(f"{setting}: its loss differs from minigpt2's by at most {largest:.2g} in any step, ", end="")
            print(f"and it took {times:.2f} x the time")


def _draw(curves: Curves, over: str, path: Path) -> None:
    """The losses of all runs over the steps or the seconds, thin those of training, with points those of validation."""
    figure = import_extra("plots", "matplotlib.figure", "--out").Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (setting, found) in enumerate(curves.items()):
        for curve in found:
            ends = [0.0, *curve.seconds] if over == "seconds" else range(len(curve.loss) + 1)
            axes.plot(ends[1:], curve.loss, color=f"C{i}", linewidth=0.5, alpha=0.6)
            points = [(ends[step], loss) for step, loss in curve.validation.items() if math.isfinite(loss)]
            axes.plot(
                *zip(*points, strict=True), ".-", color=f"C{i}", label=str(setting) if curve is found[0] else None
            )
    axes.set(xlabel=over, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(title="points: validation")
    figure.savefig(path, dpi=150)
