"""What a training run measures of itself, and the file that keeps it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from minigpt2.config import GPT2Config
from minigpt2.device import peak_bytes, synchronize
from minigpt2.extras import MissingExtra, import_extra
from minigpt2.files import atomic_write, errors_name, flush
from minigpt2.ops.products import multiply
from minigpt2.training.parallel import Processes

__all__ = ["Metrics", "Speedometer", "flops_per_token", "matmul_rate", "plot_losses", "read_rows"]

FILE = "metrics.jsonl"


class Metrics:
    """`folder`/metrics.jsonl: one JSON object a step; with `tensorboard`, the same for TensorBoard in `folder`/tb.

    `step` is where the run goes on: rows of later steps, which a killed run left, are removed. Of many processes only
    one `writes`.
    """

    _file: TextIO | None
    _board: Any

    def __init__(self, folder: Path, step: int = 0, *, tensorboard: bool = False, writes: bool = True) -> None:
        self._started, self._before, self._board, self._file = time.perf_counter(), 0.0, None, None
        if not writes:
            return
        self._path = folder / FILE
        rows = [row for row in read_rows(self._path) if row["step"] <= step]
        with atomic_write(self._path) as new:
            new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._before = float(rows[-1]["seconds"]) if rows else 0.0
        self._file = self._path.open("a", encoding="utf-8")
        if tensorboard:
            writer = import_extra("tensorboard", "torch.utils.tensorboard", "--tensorboard").SummaryWriter
            self._board = writer(str(folder / "tb"), purge_step=step + 1)

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
        if self._board is not None:
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(key, value, row["step"])

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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, none if there is no file. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot_losses(folder: Path) -> str:
    """Draw the losses of `folder`/metrics.jsonl over the tokens as `folder`/loss.png. Returns one line that says where
    the picture is, or how to get one where matplotlib is missing."""
    try:
        drawing = import_extra("plots", "matplotlib.figure", "no picture of the losses")
    except MissingExtra as error:
        return str(error)
    rows = read_rows(folder / FILE)
    axes = (figure := drawing.Figure(figsize=(8, 5), layout="constrained")).subplots()
    trained = [(row["tokens"], row["loss"]) for row in rows if row["loss"] is not None]
    validated = [(row["tokens"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if rows and rows[0].get("val_loss_before") is not None:
        validated.insert(0, (0, rows[0]["val_loss_before"]))
    axes.plot(*zip(*trained, strict=True), label="training", linewidth=1) if trained else None
    axes.plot(*zip(*validated, strict=True), label="validation", marker="o") if validated else None
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.set_title(str(folder), parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(folder / "loss.png") as path:
        figure.savefig(path, format="png", dpi=120)
    return f"the loss curve is {folder}/loss.png"


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
