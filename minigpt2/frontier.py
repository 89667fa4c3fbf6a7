"""The frontier of memory and time: every notch, the fastest that fits a budget, and all of them as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

from minigpt2.config import GPT2Config
from minigpt2.memory import MOMENTS, ORDINARY, Footprint, Stepping, footprint, format_bytes
from minigpt2.recompute import RECOMPUTE

__all__ = ["as_json", "fastest_that_fits", "notches", "table", "worth_it"]


def notches(
    config: GPT2Config, batch: int, length: int, ways: Iterable[Stepping] = (ORDINARY,), **settings: object
) -> list[Footprint]:
    """Every setting of the two dials that differs from the others, with each of the steppings, least memory first.
    `settings` as in footprint."""
    found = [
        footprint(config, batch, length, checkpoint_every=k, recompute=recompute, stepping=stepping, **settings)  # type: ignore[arg-type]
        for stepping in ways
        for recompute in RECOMPUTE
        for k in range(config.n_layer)
        if k or recompute != "keep-attention"  # without a recomputed block there is no attention to keep
    ]
    return sorted(found, key=lambda f: (f.peak, f.extra_flops))


def fastest_that_fits(found: list[Footprint], budget: int, baseline: int = 0) -> Footprint:
    """The notch with the least recomputation whose peak, on top of `baseline`, is at most `budget` bytes; ValueError if
    there is none. Moments are the most exact of those that any of them fits with; and the optimizer steps after the
    backward pass, if it can as fast."""
    fitting = [f for f in found if f.peak + baseline <= budget]
    if not fitting:
        least = min(found, key=lambda f: f.peak)
        needs = f"{format_bytes(least.peak + baseline)}, with {least.dials}"
        raise ValueError(f"nothing fits {format_bytes(budget)}: the least is {needs}")
    exactness = list(MOMENTS).index
    return min(fitting, key=lambda f: (exactness(f.stepping.moments), f.extra_flops, f.stepping.in_backward, f.peak))


def worth_it(found: list[Footprint]) -> list[Footprint]:
    """The notches that no other beats in both memory and extra work, least memory first."""
    kept: list[Footprint] = []
    for f in sorted(found, key=lambda f: (f.peak, f.extra_flops)):
        if not kept or f.extra_flops < kept[-1].extra_flops:
            kept.append(f)
    return kept


def table(found: list[Footprint], budget: int | None = None, baseline: int = 0) -> str:
    """Notches as lines of text, one for each setting of the dials: the peaks, `baseline` bytes of interpreter included,
    with each stepping. Of a budget, which also includes them, peaks that exceed it are in parentheses."""
    chosen = None
    if budget is not None and any(f.peak + baseline <= budget for f in found):
        chosen = fastest_that_fits(found, budget, baseline)
    ways = list(dict.fromkeys(f.stepping for f in sorted(found, key=lambda f: -f.peak)))
    rows: dict[tuple[int, str], dict[Stepping, Footprint]] = {}
    for f in found:
        rows.setdefault((f.checkpoint_every, f.recompute), {})[f.stepping] = f
    lines = [
        f"{'checkpoint_every':>16}  {'recompute':<14}  {'extra work':>10}" + "".join(f"{w.name:>13}" for w in ways)
    ]
    for (k, recompute), row in rows.items():
        name = "-" if (k, recompute) == (0, "block") else recompute
        line = f"{k:>16}  {name:<14}  {row[ways[0]].extra_work:>10.1%}"
        for f in map(row.__getitem__, ways):
            peak = format_bytes(f.peak + baseline)
            over = budget is not None and f.peak + baseline > budget
            line += f"{f'({peak})':>13}" if over else f"{peak:>12} "
        here = chosen is not None and row.get(chosen.stepping) is chosen
        mark = f"  <- {chosen.stepping.name}: the fastest that fits" if chosen is not None and here else ""
        lines.append((line + mark).rstrip())
    return "\n".join(lines)


def as_json(found: list[Footprint], budget: int | None = None, baseline: int = 0) -> str:
    """Notches as a list of JSON objects: what a Footprint has, with `baseline` bytes of interpreter added to its peak,
    and of a budget whether it `fits`."""
    rows = []
    for f in found:
        row = dataclasses.asdict(f) | {"stepping": f.stepping._asdict(), "peak": f.peak + baseline}
        rows.append(row | ({} if budget is None else {"fits": f.peak + baseline <= budget}))
    return json.dumps(rows, indent=2)
