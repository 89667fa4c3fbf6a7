"""Pictures of memory, with one colour for one thing in all of them."""

from __future__ import annotations

from pathlib import Path

from minigpt2.extras import import_extra
from minigpt2.frontier import worth_it
from minigpt2.memory import Footprint, format_bytes
from minigpt2.recompute import RECOMPUTE

__all__ = ["COLOURS", "frontier"]

# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = {
    "block": "#009E73",
    "keep-attention": "#CC79A7",
    "pointwise": "#E69F00",
    "weights": "#999999",
    "optimizer": "#CCCCCC",
    "gradients": "#D55E00",
    "activations": "#56B4E9",
    "forward": "#0072B2",
    "transformers": "#000000",
}


def frontier(found: list[Footprint], path: str | Path, budget: int | None = None, baseline: int = 0) -> None:
    """Draw extra work over peak memory, a line for each stepping, of the notches that no other of it beats in both, to
    a file that matplotlib can write; MissingExtra without matplotlib."""
    drawing = import_extra("plots", "matplotlib.figure", "no picture of the frontier")
    figure = drawing.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for stepping, style in zip(
        dict.fromkeys(f.stepping for f in reversed(found)), ("-", "--", "-.", ":"), strict=False
    ):
        line = worth_it([f for f in found if f.stepping == stepping])
        x, y = [(f.peak + baseline) / 2**30 for f in line], [100 * f.extra_work for f in line]
        axes.plot(x, y, style, color="gray", linewidth=1, label=stepping.name)
        for f, at_x, at_y in zip(line, x, y, strict=True):
            axes.plot(at_x, at_y, "o", color=COLOURS[f.recompute], markersize=4)
            axes.annotate(str(f.checkpoint_every), (at_x, at_y), xytext=(0, 4), textcoords="offset points", fontsize=7)
    for recompute in RECOMPUTE:
        axes.plot([], [], "o", color=COLOURS[recompute], markersize=4, label=f'recompute="{recompute}"')
    if budget is not None:
        axes.axvline(budget / 2**30, color="gray", linestyle="--", label=f"budget {format_bytes(budget)}")
    axes.set(xlabel="peak memory (GiB)", ylabel="extra work (%)", title="The dial; numbers are checkpoint_every")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
