"""The dial, measured: peak memory and time of training steps at each notch, beside transformers and the prediction."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from minigpt2.bench.header import header
from minigpt2.bench.worker import Job, Result, measure
from minigpt2.command_line import optional
from minigpt2.config import OFFICIAL_SIZES, GPT2Config
from minigpt2.extras import import_extra
from minigpt2.memory import footprint
from minigpt2.pictures import COLOURS

__all__ = ["bench_memory"]


class Setting(NamedTuple):
    library: str
    checkpoint_every: int
    recompute: str

    @property
    def name(self) -> str:
        if self.library == "transformers":
            return "transformers" + (", gradient checkpointing" if self.checkpoint_every else "")
        if self == Setting("minigpt2", 0, "block"):
            return "no recomputation"
        return ", ".join(
            part
            for part in (
                f"checkpoint_every={self.checkpoint_every}" if self.checkpoint_every else "",
                f'"{self.recompute}"' if self.recompute != "block" else "",
            )
            if part
        )


def settings(n_layer: int, every: Iterable[int] | None, recompute: Iterable[str], compare: bool) -> list[Setting]:
    """What is measured: no recomputation first, then the notches, then transformers where it is installed."""
    ks = range(1, n_layer) if every is None else every
    found = [Setting("minigpt2", 0, "block")]
    for mode in recompute:
        found += [Setting("minigpt2", 0, mode)] * (mode == "pointwise")
        found += [Setting("minigpt2", k, mode) for k in ks]
    if compare:
        try:
            import transformers  # noqa: F401
        except ImportError:
            print("transformers is not installed, so there is no comparison: pip install transformers")
        else:
            found += [Setting("transformers", k, "block") for k in (0, 1)]
    return found


def bench_memory(
    model: str = "gpt2",
    *,
    batch: int = 4,
    length: int = 1024,
    dropout: float = 0.1,
    every: Annotated[tuple[int, ...] | None, optional("INT [INT ...]")] = None,
    recompute: tuple[str, ...] = ("pointwise", "keep-attention", "block"),
    steps: int = 3,
    rounds: int = 1,
    compare: bool = True,
    precision: Literal["fp32", "bf16"] = "fp32",
    config: Annotated[dict[str, int] | None, tyro.conf.Suppress] = None,
    out: Annotated[Path | None, optional("OUT")] = None,
) -> list[tuple[Setting, Result]]:
    """Measure memory and time of training at every setting of recomputation.
    $ minigpt2 bench memory --batch 1 --length 256 --every 3

    For each, in a process of its own: peak memory in GiB, how far off `minigpt2 plan` was, and the time of a step over
    that without recomputation (the median and its range). AdamW; minigpt2 runs as in `minigpt2 train`,
    transformers as installed, with its sdpa attention.

    Args:
        model: An official name.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        dropout: All three dropouts.
        every: Values of --checkpoint-every to measure. Default: all.
        recompute: Values of --recompute to measure.
        steps: Steps in a process, of which the first two, or of three the first, are warm-up.
        rounds: How often everything is measured, in turn.
        compare: Also measure transformers, with and without its gradient checkpointing, if it is installed.
        precision: What matrix products are computed in, of both libraries, by autocast.
        config: Fields of GPT2Config: another shape than the official one.
        out: Write OUT.csv and OUT.png too; the picture has the least times, since noise only adds to them. Default: no
            files.
    """
    if model not in OFFICIAL_SIZES:
        raise ValueError(f"model must be one of {', '.join(OFFICIAL_SIZES)}, got {model!r}")
    if out is not None:
        import_extra("plots", "matplotlib.figure", "--out")  # before hours of measuring
    shape: dict[str, int] = config or dict(OFFICIAL_SIZES[model])
    chosen = settings(GPT2Config().replace(**shape).n_layer, every, recompute, compare)
    print(header("memory"))
    print(f"{model}, batch {batch} x {length}, dropout {dropout}, {precision}, AdamW, {steps} steps a process")
    results: dict[Setting, list[Result]] = {setting: [] for setting in chosen}
    for _ in range(rounds):
        for setting in chosen:
            job = Job(setting.library, shape, batch, length, dropout, setting.checkpoint_every, setting.recompute)
            ours = setting.library == "minigpt2"
            results[setting].append(measure(dataclasses.replace(job, steps=steps, tuned=ours, precision=precision)))
            print(f"  measured: {setting.name}", flush=True)
    rows = [_row(setting, results, GPT2Config().replace(**shape), batch, length, precision) for setting in chosen]
    print(f"{'':<42} {'peak GiB':>8} {'predicted':>9}  {'time, x no recomputation':<24}")
    for row in rows:
        predicted = f"{row['error']:+.1%}" if row["error"] != "" else ""
        spread = f"{row['time']:.2f} [{row['time_low']:.2f}, {row['time_high']:.2f}]"
        print(f"{row['setting']:<42} {row['peak_gib']:>8.2f} {predicted:>9}  {spread:<24}")
    if out is not None:
        _write(rows, out)
    return [(setting, found[-1]) for setting, found in results.items()]


def _row(
    setting: Setting, results: dict[Setting, list[Result]], config: GPT2Config, batch: int, length: int, precision: str
) -> dict[str, float | str]:
    base = statistics.median(s for r in results[Setting("minigpt2", 0, "block")] for s in r.seconds)
    seconds = [s for r in results[setting] for s in r.seconds]
    measured = statistics.median(r.peak - r.baseline for r in results[setting])
    error: float | str = ""
    if setting.library == "minigpt2":
        dials = {"checkpoint_every": setting.checkpoint_every, "recompute": setting.recompute, "precision": precision}
        error = footprint(config, batch, length, **dials).peak / measured - 1  # type: ignore[arg-type]
    return {
        "setting": setting.name,
        **setting._asdict(),
        "peak_gib": statistics.median(r.peak for r in results[setting]) / 2**30,
        "error": error,
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
        return float(row["peak_gib"]), float(row["time_low"]) / float(ours[0]["time_low"])

    drawing = import_extra("plots", "matplotlib.figure", "--out")
    figure = drawing.Figure(figsize=(11 if theirs else 6.5, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if theirs else 1, squeeze=False)[0]
    for axes, peers in zip(panels, ([], theirs), strict=False):  # the dial by itself, and beside transformers
        for recompute in dict.fromkeys(str(row["recompute"]) for row in ours[1:]):
            line = [row for row in ours if row["recompute"] == recompute or row is ours[0]]
            line.sort(key=lambda row: row["peak_gib"])
            look = {"color": COLOURS[recompute], "markersize": 4, "label": f'recompute="{recompute}"'}
            axes.plot(*zip(*map(point, line), strict=True), "o-", **look)
            for row in line:
                text = "" if peers else str(row["checkpoint_every"])
                axes.annotate(text, point(row), xytext=(3, 3), textcoords="offset points", fontsize=7)
        for row in peers:
            axes.plot(*point(row), "s", color=COLOURS["transformers"])
            axes.annotate(str(row["setting"]), point(row), xytext=(5, 4), textcoords="offset points", fontsize=7)
        axes.set(xlabel="peak resident memory (GiB)", ylabel="least time of a step, no recomputation = 1")
        axes.set_title("beside transformers" if peers else "numbers are checkpoint_every", fontsize=9)
        axes.margins(x=0.25 if peers else 0.05)
        axes.grid(alpha=0.3)
    if len(ours) > 1:
        panels[0].legend(fontsize=8)
    figure.savefig(out.with_suffix(".png"), dpi=150)
