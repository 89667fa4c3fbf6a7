"""One training step as a timeline: which block runs when, and what its tensors hold meanwhile."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from minigpt2.bench.header import header
from minigpt2.command_line import RECOMPUTES, optional
from minigpt2.config import OFFICIAL_SIZES, GPT2Config
from minigpt2.extras import import_extra
from minigpt2.memory import format_bytes
from minigpt2.model import GPT2
from minigpt2.pictures import COLOURS

__all__ = ["Timeline", "bench_timeline"]

Event = dict[str, Any]


@dataclass
class Timeline:
    """One step of training: forward, backward, AdamW. Seconds from its start, bytes of tensors."""

    weights: int
    optimizer: int
    """Bytes of the optimizer's state."""
    spans: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """Begin and end of `"forward"`, `"backward"` and `"optimizer"`, and of each run of `"block I"`: the second is its
    recomputation; the end of `"backward of block I"`."""
    seconds: list[float] = field(default_factory=list)
    """When memory was allocated or given back ..."""
    gradients: list[int] = field(default_factory=list)
    """... and what was then held by the gradients of the weights ..."""
    activations: list[int] = field(default_factory=list)
    """... and by all else: what is kept for the backward pass, and what is worked in."""

    @property
    def peak(self) -> int:
        """The most that was held at once."""
        return self.weights + self.optimizer + max(map(sum, zip(self.gradients, self.activations, strict=True)))

    @property
    def kept(self) -> int:
        """What was kept between the forward and the backward pass."""
        end = self.spans["forward"][0][1]
        return [a for s, a in zip(self.seconds, self.activations, strict=True) if s <= end][-1]


def bench_timeline(
    model: str = "gpt2",
    *,
    batch: int = 4,
    length: int = 1024,
    dropout: float = 0.1,
    every: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (0, 3, 1),
    recompute: Annotated[str, RECOMPUTES] = "block",
    config: Annotated[dict[str, int] | None, tyro.conf.Suppress] = None,
    out: Annotated[Path | None, optional("FILE")] = None,
) -> list[Timeline]:
    """Measure one training step as a timeline of its memory.
    $ minigpt2 bench timeline --every 0 3 --out timeline.png

    The second step of a fresh model in float32 with AdamW, under PyTorch's profiler, which sees each tensor come and
    go. It counts tensors, not the process, and its times include fresh pages of memory, since the profiler does not see
    into the arena of `minigpt2 train`: `minigpt2 bench memory` measures processes as they train.

    Args:
        model: An official name.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        dropout: All three dropouts.
        every: Values of --checkpoint-every.
        recompute: What a recomputed block keeps.
        config: Fields of GPT2Config: another shape than the official one.
        out: Draw the timelines, side by side, into this file, such as timeline.png. Default: no picture.
    """
    if model not in OFFICIAL_SIZES:
        raise ValueError(f"model must be one of {', '.join(OFFICIAL_SIZES)}, got {model!r}")
    if out is not None:
        import_extra("plots", "matplotlib.figure", "--out")
    drop = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
    shape = GPT2Config().replace(**(config or OFFICIAL_SIZES[model]), **drop)  # type: ignore[arg-type]
    print(header("timeline"))
    print(f"{model}, batch {batch} x {length}, dropout {dropout}, recompute={recompute!r}, AdamW; bytes of tensors")
    print(f"{'checkpoint_every':>16} {'forward':>8} {'backward':>9} {'recomputed':>10} {'kept':>10} {'peak':>10}")
    found = []
    for k in every:
        timeline = _measure(GPT2(shape, checkpoint_every=k, recompute=recompute).train(), batch, length)
        (forward,), (backward,) = ([b - a for a, b in timeline.spans[part]] for part in ("forward", "backward"))
        again = sum(len(timeline.spans[f"block {i}"]) > 1 for i in range(shape.n_layer))
        sizes = (format_bytes(n) for n in (timeline.kept, timeline.peak))
        print("{:>16} {:>6.2f} s {:>7.2f} s {:>3} blocks {:>10} {:>10}".format(k, forward, backward, again, *sizes))
        found.append(timeline)
    if out is not None:
        _draw(dict(zip(every, found, strict=True)), shape.n_layer, out)
    return found


def _measure(model: GPT2, batch: int, length: int) -> Timeline:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(model.config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))

    def step() -> list[Tensor]:
        with record_function("forward"):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        with record_function("backward"):
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        return gradients

    step()
    for i, block in enumerate(model.h):
        _mark(block, i)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        places = {gradient.data_ptr() for gradient in step()}
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder, "trace.json")))
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    timeline = Timeline(sum(p.nbytes for p in model.parameters()), sum(t.nbytes for t in state))
    return _read(timeline, events, places)


def _mark(block: nn.Module, i: int) -> None:
    """Let a block say in the profiler's trace when it runs, and when its backward pass is done."""
    running: list[Any] = []

    def begin(*_: object) -> None:
        running.append(record_function(f"block {i}"))
        running[-1].__enter__()

    def end(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    def done(*_: object) -> None:
        with record_function(f"backward of block {i}"):
            pass

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end, always_call=True)  # a recomputation may stop before the block's end
    first: nn.LayerNorm = block.ln_1  # type: ignore[assignment]
    first.weight.register_post_accumulate_grad_hook(done)


def _read(timeline: Timeline, events: list[Event], places: set[int]) -> Timeline:
    """Fill in what the trace says; `places` are the addresses at which gradients lay in the end."""
    mine: Callable[[Event], bool] = lambda e: e.get("cat") == "user_annotation"  # noqa: E731
    start = min(e["ts"] for e in events if mine(e))
    for e in sorted(filter(mine, events), key=lambda e: e["ts"]):
        begin = (e["ts"] - start) / 1e6
        timeline.spans[e["name"]].append((begin, begin + e["dur"] / 1e6))
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    # Of the tensors that lay where a gradient lies in the end, the last is the gradient.
    last = {e["args"]["Addr"]: n for n, e in enumerate(memory) if e["args"]["Bytes"] > 0}
    gradients, others = [], []
    for n, e in enumerate(memory):
        address, size = e["args"]["Addr"], e["args"]["Bytes"]
        gradient = address in places and n >= last.get(address, 0)
        gradients.append(size if gradient else 0)
        others.append(0 if gradient else size)
    timeline.seconds = [(e["ts"] - start) / 1e6 for e in memory]
    timeline.gradients, timeline.activations = (list(itertools.accumulate(sizes)) for sizes in (gradients, others))
    return timeline


def _draw(timelines: dict[int, Timeline], n_layer: int, path: Path) -> None:
    drawing = import_extra("plots", "matplotlib.figure", "--out")
    figure = drawing.Figure(figsize=(4.2 * len(timelines), 6), layout="constrained")
    options = {"sharex": True, "sharey": "row", "squeeze": False, "height_ratios": (1, 1.4)}
    above, below = figure.subplots(2, len(timelines), **options)
    for (k, timeline), blocks, memory in zip(timelines.items(), above, below, strict=True):
        _draw_blocks(timeline, n_layer, blocks)
        blocks.set_title("no recomputation" if k in (0, n_layer) else f"checkpoint_every={k}", fontsize=10)
        gib = {"weights": [timeline.weights / 2**30] * len(timeline.seconds)}
        gib["optimizer's state"] = [timeline.optimizer / 2**30] * len(timeline.seconds)
        gib |= {name: [n / 2**30 for n in getattr(timeline, name)] for name in ("gradients", "activations")}
        colours = [COLOURS[name.removesuffix("'s state")] for name in gib]
        memory.stackplot(timeline.seconds, *gib.values(), labels=gib, colors=colours, step="post")
        for part in ("backward", "optimizer"):
            memory.axvline(timeline.spans[part][0][0], color="black", linewidth=0.8)
            look: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "rotation": 90, "fontsize": 8}
            memory.annotate(f" {part}", (timeline.spans[part][0][0], 0.02), **look)
        memory.set(xlabel="seconds")
        memory.grid(alpha=0.3)
    above[0].set(ylabel="block")
    below[0].set(ylabel="GiB of tensors")
    for axes, place in ((above[0], "outside upper center"), (below[0], "outside lower center")):
        figure.legend(*axes.get_legend_handles_labels(), loc=place, ncols=4, fontsize=9)
    figure.savefig(path, dpi=130)


def _draw_blocks(timeline: Timeline, n_layer: int, axes: Any) -> None:
    """A bar for each run of each block, the first at the bottom."""
    busy = timeline.spans["backward"][0][0]  # the end of what ran before
    for i in reversed(range(n_layer)):
        runs = timeline.spans[f"block {i}"]
        end = timeline.spans[f"backward of block {i}"][0][1]
        begin = max([busy, *(stop for a, stop in _recomputed(timeline, n_layer) if stop < end)])
        bars = {"forward": runs[:1], "recomputed": runs[1:], "backward": [(begin, end)]}
        for name, colour in (("forward", "forward"), ("recomputed", "block"), ("backward", "gradients")):
            widths = [(a, b - a) for a, b in bars[name]]
            label = name if i == 0 else None
            axes.broken_barh(widths, (i - 0.4, 0.8), color=COLOURS[colour], label=label)
        busy = end
    axes.set(ylim=(-0.6, n_layer - 0.4), yticks=range(0, n_layer, 3))
    axes.grid(alpha=0.3)


def _recomputed(timeline: Timeline, n_layer: int) -> list[tuple[float, float]]:
    return [run for i in range(n_layer) for run in timeline.spans[f"block {i}"][1:]]
