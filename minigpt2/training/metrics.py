"""What a training run measures of itself, the file that keeps it, and the services that show it."""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from minigpt2.config import GPT2Config
from minigpt2.device import peak_bytes, synchronize
from minigpt2.extras import MissingExtra, import_extra
from minigpt2.files import atomic_write, errors_name, flush
from minigpt2.ops.products import multiply
from minigpt2.progress import Progress
from minigpt2.training.parallel import Processes

__all__ = [
    "Metrics",
    "Speedometer",
    "Steps",
    "check_trackers",
    "enough_steps",
    "flops_per_token",
    "matmul_rate",
    "plot_losses",
    "read_rows",
]

FILE = "metrics.jsonl"

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""What shows a run beside its file: the setting that asks for it, which is the extra that brings it; its module."""


def check_trackers(settings: dict[str, Any]) -> list[str]:
    """What keeps each tracker that these settings ask for from showing a run, with what to do about it."""
    problems = []
    for name in filter(settings.get, TRACKERS):
        try:
            tracker = import_extra(name, TRACKERS[name], f"--{name}")
            online = os.environ.get("WANDB_MODE", "online") == "online"
            if name == "wandb" and online and os.environ.get("RANK", "0") == "0":  # of torchrun's, the one that writes
                tracker.login()  # asks for the key on a terminal, and elsewhere raises an error without one
        except MissingExtra as error:
            problems.append(str(error))
        except Exception as error:  # of wandb's own kinds
            problems.append(f"--{name}: {' '.join(str(error).split())} WANDB_MODE=offline needs no account.")
    return problems


class Metrics:
    """`folder`/metrics.jsonl: one JSON object a step; and the same for TensorBoard in `folder`/tb, and for Weights &
    Biases, where the run's `settings` have `tensorboard` or `wandb`.

    `step` is where the run goes on: rows of later steps, which a killed run left, are removed. Of many processes only
    one `writes`.
    """

    _file: TextIO | None
    _board: Any
    _wandb: Any

    def __init__(
        self, folder: Path, step: int = 0, settings: dict[str, Any] | None = None, *, writes: bool = True
    ) -> None:
        settings = settings or {}
        self._started, self._before, self._file = time.perf_counter(), 0.0, None
        self._board = self._wandb = None
        if not writes:
            return
        self._path = folder / FILE
        rows = [row for row in read_rows(self._path) if row["step"] <= step]
        with atomic_write(self._path) as new:
            new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._before = max((row.get("seconds") or 0.0 for row in rows), default=0.0)
        self._file = self._path.open("a", encoding="utf-8")
        if settings.get("tensorboard"):
            writer = import_extra("tensorboard", TRACKERS["tensorboard"], "--tensorboard").SummaryWriter
            self._board = writer(str(folder / "tb"), purge_step=step + 1)
        if settings.get("wandb"):
            self._wandb = _wandb_run(folder, settings)

    @property
    def seconds(self) -> float:
        """Time that this run has taken, including what it took before it was resumed."""
        return self._before + time.perf_counter() - self._started

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, which has a `step`. JSON has no NaN: a number that is not finite is written as null."""
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in row.items()}
        with errors_name(self._path):
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        if self._board is not None:
            for key, value in numbers.items():
                if key != "step":
                    self._board.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers)

    def flush(self) -> None:
        """Have the rows so far on disk before this returns."""
        if self._file is not None:
            flush(self._path)
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def _wandb_run(folder: Path, settings: dict[str, Any]) -> Any:
    """The run at Weights & Biases that belongs to a run folder, always the same one, by its id in `folder`/wandb/id.
    Project and name are those of WANDB_PROJECT and WANDB_NAME, else minigpt2 and the folder's name."""
    wandb = import_extra("wandb", TRACKERS["wandb"], "--wandb")
    known = folder / "wandb" / "id"
    if not known.exists():
        known.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(known) as path:
            path.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minigpt2"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=known.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=settings,
            allow_val_change=True,  # by a run that goes on with other settings
        )
    except wandb.Error as error:
        raise ConnectionError(f"--wandb: {' '.join(str(error).split())}") from None
    run.define_metric("*", step_metric="step")  # wandb's own counter of steps could not go back to a snapshot
    return run


class Steps(Progress):
    """The progress of a run, with its losses and its speed."""

    def __init__(self, total: int, initial: int, disable: bool) -> None:
        bar = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        line = "step {n_fmt}/{total_fmt}{postfix}, {elapsed} gone, {remaining} left"
        super().__init__(total=total, initial=initial, bar_format=bar, line=line, disable=disable)

    def show(self, row: dict[str, Any], val_loss: float) -> None:
        """Count a step, given its row of metrics and the newest validation loss."""
        if self.disable:
            return
        text = f"loss {row['loss']:.3f}, validation {val_loss:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
        if self.ncols is None or self.ncols >= 100:  # or the terminal has no room for it
            text += f", peak {row['peak_memory_gib']:.2f} GiB"
        self.set_postfix_str(text, refresh=False)
        self.update()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, none if there is no file. Lines that are none, as a kill or a crash of the machine
    leaves them, are left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                found.append(row)
    return found


def validations(rows: list[dict[str, Any]]) -> list[tuple[int, int, float]]:
    """The validations in rows of metrics, that before training among them: (step, tokens, loss) each."""
    found = [(row["step"], row["tokens"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if rows and rows[0].get("val_loss_before") is not None:
        found.insert(0, (0, 0, rows[0]["val_loss_before"]))
    return found


def enough_steps(folder: Path) -> str | None:
    """Whether a run that is over had too few steps or too many, in one line with what to do, by the validations in
    `folder`/metrics.jsonl; None where they do not say.

    Too few: in its last quarter, where the rate is near its lowest, the loss still fell by 0.02, which is 2% of the
    perplexity. Too many: it was best before the last quarter, and has risen by as much since.
    """
    found = validations(read_rows(folder / FILE))
    if not found:
        return None
    end, _, last = found[-1]
    best_step, _, best = min(found, key=lambda validation: validation[2])
    if 0 < best_step <= 0.75 * end and last - best >= 0.02:
        return (
            f"validation was best at step {best_step} and has risen by {last - best:.2f} since: fewer steps, "
            f"--max-steps {best_step}, or more data would have been better"
        )
    before = [loss for step, _, loss in found if 0.5 * end <= step <= 0.75 * end]
    if before and before[-1] - last >= 0.02:
        return (
            f"validation still fell by {before[-1] - last:.2f} in the last quarter: more steps would have helped; "
            f"go on with --resume --max-steps {2 * end}"
        )
    return None


def plot_losses(folder: Path) -> str:
    """Draw the losses of `folder`/metrics.jsonl over the tokens as `folder`/loss.png, and below them the norms of the
    gradients. Returns one line that says where the picture is, or how to get one where matplotlib is missing."""
    try:
        drawing = import_extra("plots", "matplotlib.figure", "no picture of the losses")
    except MissingExtra as error:
        return str(error)
    rows = read_rows(folder / FILE)
    figure = drawing.Figure(figsize=(8, 7), layout="constrained")
    losses, norms = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    _line(losses, [(row["tokens"], row.get("loss")) for row in rows], label="training", linewidth=1)
    _line(losses, [(tokens, loss) for _, tokens, loss in validations(rows)], label="validation", marker="o")
    losses.set(ylabel="loss (nats per token)")
    losses.set_title(str(folder), parse_math=False)
    _line(norms, [(row["tokens"], row.get("grad_norm")) for row in rows], label="of each step", linewidth=1)
    clipped = [(row["tokens"], row.get("grad_norm")) for row in rows if row.get("clipped")]
    _line(norms, clipped, label="clipped", marker=".", linestyle="", color="tab:orange")
    for row in rows:
        if row.get("skipped"):
            norms.axvline(row["tokens"], color="tab:red", linewidth=1)
    if skipped := sum(bool(row.get("skipped")) for row in rows):
        norms.plot([], [], color="tab:red", label=f"skipped: {skipped}")
    norms.set(xlabel="tokens", ylabel="norm of the gradient", yscale="log")
    for axes in (losses, norms):
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(folder / "loss.png") as path:
        figure.savefig(path, format="png", dpi=120)
    return f"the loss curve is {folder}/loss.png"


def _line(axes: Any, points: list[tuple[int, float | None]], **look: Any) -> None:
    """Draw those points that have a value."""
    if there := [point for point in points if point[1] is not None]:
        axes.plot(*zip(*there, strict=True), **look)


def flops_per_token(config: GPT2Config, length: int) -> float:
    """Floating-point operations of a training step for each token of sequences of `length`: two for each
    multiply-and-add, forward once and backward twice, recomputation not counted (Chowdhery et al. 2022, "PaLM",
    appendix B)."""
    C, L = config.n_embd, config.n_layer
    weights = L * (4 * C * C + 2 * C * config.inner) + config.vocab_size * C  # of the matrices in products
    return 6.0 * weights + 12.0 * L * C * length


class Speedometer:
    """Measures a run against the matrix products of its device, in the dtype that it multiplies in."""

    def __init__(self, config: GPT2Config, length: int, processes: Processes, dtype: torch.dtype) -> None:
        self._device = processes.device
        self._share = flops_per_token(config, length) / processes.world / matmul_rate(self._device, dtype)

    def row(self, tokens: int, seconds: float) -> dict[str, float]:
        """Tokens a second, model-FLOP utilisation (a share of 1), and peak memory in GiB."""
        speed = tokens / seconds
        peak = peak_bytes(self._device) / 2**30
        return {"tokens_per_second": speed, "mfu": speed * self._share, "peak_memory_gib": peak}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, computed as the model's are, the best of three: the yardstick of
    model-FLOP utilisation, since no table knows every device. Draws no random numbers."""
    n, best = 128, 0.0
    while n < 8192 and best < 0.005:  # larger until it takes a moment: some dtypes are very slow on some devices
        n, best = 2 * n, float("inf")
        a = torch.full((n, n), 0.5, device=device, dtype=dtype)
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            multiply(a, a)
            synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2.0 * n**3 / best
