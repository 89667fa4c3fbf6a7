"""The dial, measured: peak memory and time of training steps at each notch, beside transformers and the prediction."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from minigpt2.bench.header import header
from minigpt2.bench.worker import Job, Result, measure
from minigpt2.command_line import optional
from minigpt2.config import OFFICIAL_SIZES, GPT2Config
from minigpt2.extras import import_extra
from minigpt2.machine import free_bytes
from minigpt2.memory import MOMENTS, footprint, format_bytes, steppings
from minigpt2.pictures import COLOURS

__all__ = ["bench_memory"]


Optimizer = Literal["ordinary", "in-backward", "bf16", "8bit"]
STEPPINGS = {stepping.name.replace(" ", "-"): stepping for stepping in steppings()}


class Setting(NamedTuple):
    library: str
    checkpoint_every: int
    recompute: str
    optimizer: str = "ordinary"

    @property
    def name(self) -> str:
        if self.library == "transformers":
            return "transformers" + (", gradient checkpointing" if self.checkpoint_every else "")
        if self == Setting("minigpt2", 0, "block"):
            return "no recomputation"
        parts = (
            f"checkpoint_every={self.checkpoint_every}" if self.checkpoint_every else "",
            f'"{self.recompute}"' if self.recompute != "block" else "",
            self.optimizer if self.optimizer != "ordinary" else "",
        )
        return ", ".join(filter(None, parts))


def settings(
    n_layer: int, every: Iterable[int] | None, recompute: Iterable[str], optimizer: Iterable[str], compare: bool
) -> list[Setting]:
    """What is measured: no recomputation first, then the notches, then transformers where it is installed."""
    ks = [0, *range(1, n_layer)] if every is None else [0, *every]
    found = [Setting("minigpt2", 0, "block")]
    for way in optimizer:
        for mode in recompute:  # without a recomputed block there is no attention to keep
            found += [Setting("minigpt2", k, mode, way) for k in ks if k or mode != "keep-attention"]
    if compare:
        try:
            import transformers  # noqa: F401
        except ImportError:
            print("transformers is not installed, so there is no comparison: pip install transformers")
        else:
            found += [Setting("transformers", k, "block") for k in (0, 1)]
    return list(dict.fromkeys(found))


def bench_memory(
    model: str = "gpt2",
    *,
    batch: int = 4,
    length: int = 1024,
    dropout: float = 0.1,
    every: Annotated[tuple[int, ...] | None, optional("INT [INT ...]")] = None,
    recompute: tuple[str, ...] = ("pointwise", "keep-attention", "block"),
    optimizer: tuple[Optimizer, ...] = ("ordinary",),
    steps: int = 3,
    rounds: int = 1,
    compare: bool = True,
    precision: Literal["fp32", "bf16"] = "fp32",
    config: Annotated[dict[str, int] | None, tyro.conf.Suppress] = None,
    out: Annotated[Path | None, optional("OUT")] = None,
) -> list[tuple[Setting, Result]]:
    """Measure memory and time of training at every setting of recomputation and of the optimizer.
    $ minigpt2 bench memory --batch 1 --length 256 --every 3

    For each, in a process of its own: peak memory in GiB, how far off `minigpt2 plan` was, and the time of a step in
    seconds and over that without recomputation, or else the first that fits (the median and its range). AdamW; minigpt2
    runs as in `minigpt2 train`, transformers as installed, with its sdpa attention. What needs more memory than is free
    is left out, which of transformers only a trial says.

    Args:
        model: An official name.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        dropout: All three dropouts.
        every: Values of --checkpoint-every to measure. Default: all.
        recompute: Values of --recompute to measure.
        optimizer: How the weights move: ordinary, in-backward, and so with moments in bf16 or 8bit.
        steps: Steps in a process, of which the first two, or of three the first, are warm-up.
        rounds: How often everything is measured, in turn.
        compare: Also measure transformers, with and without its gradient checkpointing, if it is installed.
        precision: What matrix products are computed in, of both libraries, by autocast.
        config: Fields of GPT2Config: another shape than the official one.
        out: Write OUT.csv and OUT.png too; the picture shows the median times of those that no other, with moments
            as exact, beats in both memory and time. Default: no files.
    """
    if model not in OFFICIAL_SIZES:
        raise ValueError(f"model must be one of {', '.join(OFFICIAL_SIZES)}, got {model!r}")
    if out is not None:
        import_extra("plots", "matplotlib.figure", "--out")  # before hours of measuring
    shape: dict[str, int] = config or dict(OFFICIAL_SIZES[model])
    chosen = settings(GPT2Config().replace(**shape).n_layer, every, recompute, optimizer, compare)
    print(header("memory"))
    print(f"{model}, batch {batch} x {length}, dropout {dropout}, {precision}, AdamW, {steps} steps a process")
    model_config = GPT2Config().replace(**shape)
    results: dict[Setting, list[Result]] = {}
    for _ in range(rounds):
        for setting in chosen:
            job = Job(setting.library, shape, batch, length, dropout, setting.checkpoint_every, setting.recompute)
            moments, inside = STEPPINGS[setting.optimizer]
            job = dataclasses.replace(job, steps=steps, precision=precision, moments=moments, in_backward=inside)
            ours = setting.library == "minigpt2"
            job = dataclasses.replace(job, tuned=ours, limit=None if ours else _free())
            if why := _left_out(predicted(setting, model_config, batch, length, precision)):
                print(f"  left out: {setting.name}: {why}", flush=True)
                continue
            try:
                measured = measure(job)
                results.setdefault(setting, []).append(measured)
                print(f"  measured: {setting.name}", flush=True)
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):
                    raise
                print(f"  left out: {setting.name}: it needs more than is free", flush=True)
    rows = [_row(setting, results, model_config, batch, length, precision) for setting in results]
    print(f"{'':<46} {'peak GiB':>8} {'predicted':>9} {'seconds':>8}  {'time, x the first':<24}")
    for row in rows:
        off = f"{row['error']:+.1%}" if row["error"] != "" else ""
        spread = f"{row['time']:.2f} [{row['time_low']:.2f}, {row['time_high']:.2f}]"
        print(f"{row['setting']:<46} {row['peak_gib']:>8.2f} {off:>9} {row['seconds']:>8.2f}  {spread:<24}")
    if out is not None:
        _write(rows, out)
    return [(setting, found[-1]) for setting, found in results.items()]


def predicted(setting: Setting, config: GPT2Config, batch: int, length: int, precision: str) -> int | None:
    """The bytes that a setting needs beside the interpreter; None for another library's."""
    if setting.library != "minigpt2":
        return None
    dials: dict[str, Any] = {"checkpoint_every": setting.checkpoint_every, "recompute": setting.recompute}
    stepping = STEPPINGS[setting.optimizer]
    return footprint(config, batch, length, **dials, stepping=stepping, precision=precision).peak


def _free() -> int | None:
    try:
        return free_bytes()
    except ValueError:  # a system that does not say
        return None


def _left_out(needed: int | None) -> str:
    """Why a setting that needs so many bytes cannot be measured here, or nothing."""
    free = _free()
    if needed is None or free is None or needed <= free:
        return ""
    return f"it needs {format_bytes(needed)}, and {format_bytes(free)} are free"


def _row(
    setting: Setting,
    results: dict[Setting, list[Result]],
    config: GPT2Config,
    batch: int,
    length: int,
    precision: str,
) -> dict[str, float | str]:
    base = statistics.median(s for r in next(iter(results.values())) for s in r.seconds)
    seconds = [s for r in results[setting] for s in r.seconds]
    measured = statistics.median(r.peak - r.baseline for r in results[setting])
    needed = predicted(setting, config, batch, length, precision)
    return {
        "setting": setting.name,
        **setting._asdict(),
        "peak_gib": statistics.median(r.peak for r in results[setting]) / 2**30,
        "error": "" if needed is None else needed / measured - 1,
        "seconds": statistics.median(seconds),
        "time": statistics.median(seconds) / base,
        "time_low": min(seconds) / base,
        "time_high": max(seconds) / base,
    }


def _write(rows: list[dict[str, float | str]], out: Path) -> None:
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    ours = [row for row in rows if row["library"] == "minigpt2"]
    theirs = rows[len(ours) :]

    def point(row: dict[str, float | str]) -> tuple[float, float]:
        return float(row["peak_gib"]), float(row["time"])

    def beaten(row: dict[str, float | str]) -> bool:
        """Whether another, with moments that are as exact, takes less in one of memory and time, and no more in the
        other."""
        exact = [other for other in ours if moments(other) >= moments(row) and point(other) != point(row)]
        return any(all(a <= b for a, b in zip(point(other), point(row), strict=True)) for other in exact)

    def moments(row: dict[str, float | str]) -> int:
        return MOMENTS[STEPPINGS[str(row["optimizer"])].moments]

    drawing = import_extra("plots", "matplotlib.figure", "--out")
    figure = drawing.Figure(figsize=(11 if theirs else 6.5, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if theirs else 1, squeeze=False)[0]
    for axes, peers in zip(panels, ([], theirs), strict=False):  # the dial by itself, and beside transformers
        for way, style in zip(dict.fromkeys(row["optimizer"] for row in ours), ("-", "--", "-.", ":"), strict=False):
            line = sorted((row for row in ours if row["optimizer"] == way and not beaten(row)), key=point)
            if line:
                axes.plot(*zip(*map(point, line), strict=True), style, color="gray", linewidth=1, label=str(way))
            for row in line:
                axes.plot(*point(row), "o", color=COLOURS[str(row["recompute"])], markersize=4)
                text = "" if peers else str(row["checkpoint_every"])
                axes.annotate(text, point(row), xytext=(3, 3), textcoords="offset points", fontsize=7)
        for row in peers:
            axes.plot(*point(row), "s", color=COLOURS["transformers"])
            axes.annotate(str(row["setting"]), point(row), xytext=(5, 4), textcoords="offset points", fontsize=7)
        axes.set(xlabel="peak resident memory (GiB)", ylabel="median time of a step, no recomputation = 1")
        axes.set_title("beside transformers" if peers else "numbers are checkpoint_every", fontsize=9)
        axes.margins(x=0.25 if peers else 0.05)
        axes.grid(alpha=0.3)
    for recompute in dict.fromkeys(str(row["recompute"]) for row in ours):
        panels[0].plot([], [], "o", color=COLOURS[recompute], markersize=4, label=f'recompute="{recompute}"')
    if len(ours) > 1:
        panels[0].legend(fontsize=8)
    figure.savefig(out.with_suffix(".png"), dpi=150)
