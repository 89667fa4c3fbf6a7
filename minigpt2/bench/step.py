"""A whole training step: tokens a second, where the time goes, and how far it is from its matrix products alone."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import tyro

from minigpt2.bench.header import header
from minigpt2.bench.worker import Job, Result, measure
from minigpt2.command_line import RECOMPUTES, optional
from minigpt2.config import OFFICIAL_SIZES, GPT2Config
from minigpt2.loss import chunk_shape
from minigpt2.ops.allocator import tune_allocator
from minigpt2.ops.products import add_transposed_product, multiply, onednn_serves, tiles_multiply, weight_gradient
from minigpt2.training.precision import DTYPES

__all__ = ["bench_step", "roofline_seconds"]

SHAPES = OFFICIAL_SIZES | {"small": {"n_layer": 6, "n_head": 6, "n_embd": 192}}


def bench_step(
    model: str = "gpt2",
    *,
    batch: int = 4,
    length: int = 1024,
    dropout: float = 0.0,
    checkpoint_every: int = 0,
    recompute: Annotated[str, RECOMPUTES] = "block",
    steps: int = 7,
    rounds: int = 1,
    compare: Annotated[Literal["hf", "hf-tuned"] | None, optional("{hf,hf-tuned}")] = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    optimizer: Literal["adamw", "muon"] = "adamw",
    compile: bool = False,
    profile: bool = False,
    config: Annotated[dict[str, int] | None, tyro.conf.Suppress] = None,
) -> dict[str, list[Result]]:
    """Measure training steps: tokens a second, time of each part, memory, share of the roofline.
    $ minigpt2 bench step --model small --batch 8 --length 256

    Medians, with their range, over every step but each process's warm-up. The roofline share is the
    time that the step's matrix products and attention would take at the rates that torch.mm reaches on the same shapes
    in this run, over the step's time; where minigpt2's products are made otherwise, also at the rates of those.
    Recomputation counts as time, not as work. A ratio to another library is the median over pairs of steps, the first
    of one with the first of the other and so on.

    Args:
        model: An official name, or small: 6 layers of width 192.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        dropout: All three dropouts.
        checkpoint_every: As in `minigpt2 train`.
        recompute: What a recomputed block keeps.
        steps: Steps in a process, of which the first two, or of three the first, are warm-up.
        rounds: How often each process is run, in turn.
        compare: Also run transformers, alternately, each in its own process: hf is as installed, hf-tuned with
            tune_allocator() too. Default: neither.
        precision: What matrix products are computed in, by autocast, of transformers too; other than fp32 also runs
            minigpt2 in fp32, alternately.
        optimizer: muon also runs minigpt2 with AdamW, alternately; transformers always has AdamW.
        compile: Also run minigpt2 compiled (torch.compile), alternately, each in its own process.
        profile: Also print where the time of a step goes, from one more process.
        config: Fields of GPT2Config: another shape than the official one.
    """
    if model not in SHAPES:
        raise ValueError(f"model must be one of {', '.join(SHAPES)}, got {model!r}")
    shape: dict[str, int] = config or dict(SHAPES[model])
    ours = Job("minigpt2", shape, batch, length, dropout, checkpoint_every, recompute, steps=steps, tuned=True)
    ours = dataclasses.replace(ours, precision=precision, optimizer=optimizer)
    jobs = {"minigpt2": ours}
    if precision != "fp32":
        jobs["fp32"] = dataclasses.replace(ours, precision="fp32")
    if optimizer != "adamw":
        jobs["adamw"] = dataclasses.replace(ours, optimizer="adamw")
    if compile:
        jobs["compiled"] = dataclasses.replace(ours, compile=True)
    if compare:
        tuned = compare == "hf-tuned"
        jobs["transformers"] = dataclasses.replace(ours, library="transformers", checkpoint_every=0, tuned=tuned)
    print(header("step"))
    print(f"{model}, batch {batch} x {length}, dropout {dropout}, {precision}, {optimizer}; {rounds} x {steps} steps")
    results: dict[str, list[Result]] = {name: [] for name in jobs}
    full = GPT2Config().replace(**shape)
    dtype = DTYPES[precision]
    rooflines: dict[str, list[float]] = {"torch.mm": []}
    if precision == "fp32" and onednn_serves(batch * length * full.n_embd * full.inner):
        rooflines["oneDNN"] = []
    if precision == "bf16" and tiles_multiply(batch * length * full.n_embd * full.inner):
        rooflines["minigpt2's own products"] = []
    if len(rooflines) > 1:
        tune_allocator()  # the memory of their results is made anew, and as in the step there shall be no fresh pages
    for _ in range(rounds):
        for name, job in jobs.items():
            results[name].append(measure(job))
        for library, times in rooflines.items():
            times.append(roofline_seconds(full, batch, length, library, dtype=dtype))
    for name, found in results.items():
        seconds = [s for r in found for s in r.seconds]
        median = statistics.median(seconds)
        parts = (
            statistics.median(s for r in found for s in getattr(r, k)) for k in ("forward", "backward", "optimizer")
        )
        print(
            f"{name:>12}: {batch * length / median:,.0f} tokens/s, {median:.2f} s a step [{min(seconds):.2f}, "
            f"{max(seconds):.2f}] (forward {{:.2f}}, backward {{:.2f}}, optimizer {{:.2f}}), peak "
            f"{max(r.peak for r in found) / 2**30:.2f} GiB, roofline share ".format(*parts)
            + ", ".join(f"{statistics.median(times) / median:.2f} of {name}" for name, times in rooflines.items())
        )
    for peer in list(jobs)[1:]:
        both = zip(results[peer], results["minigpt2"], strict=True)
        ratios = [theirs / ours for t, o in both for theirs, ours in zip(t.seconds, o.seconds, strict=True)]
        spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"minigpt2 is {statistics.median(ratios):.2f} x as fast as {peer} {spread}")
    if profile:
        print(_profile_table(measure(dataclasses.replace(ours, profile=True))))
    return results


# Where time goes: the operations, by the beginnings of their names, that each line of the profile adds up. The forward
# of an operation of our own is recorded under the name that torch.library gives its autograd function.
_FORWARD = "GeneratedBackwardFor_minigpt2_"
_LINES = {
    "matrix products": "aten::mm aten::addmm mkldnn:: aten::mkldnn minigpt2::matmul _Filled",
    "copies for them": "_Kept aten::to_mkldnn aten::copy_ aten::clone aten::contiguous",
    "attention": f"{_FORWARD}attention minigpt2::attention aten::_scaled_dot_product",
    "loss, beside its products, or on AMX with them": f"{_FORWARD}linear minigpt2::linear aten::_softmax aten::softmax "
    "aten::amax aten::gather aten::scatter aten::log aten::where aten::masked_fill",
    "sums of gradients": "aten::add_",  # those of the head's over its chunks too, where oneDNN makes the products
    "LayerNorm": "aten::native_layer_norm",
    "GELU": f"{_FORWARD}gelu minigpt2::gelu aten::gelu",
    "dropout and residual": f"{_FORWARD}dropout minigpt2::dropout aten::add aten::mul",
    "gradients of the biases": "aten::sum minigpt2::column_sums",
    "embedding": "aten::embedding aten::index",
    "AdamW": "aten::_fused_adamw Optimizer. aten::zero_",
}


def _profile_table(result: Result) -> str:
    """Percent of the profiled step on each of _LINES, and the operations that are most of the rest."""
    total = result.forward[-1] + result.backward[-1] + result.optimizer[-1]
    seconds = dict.fromkeys(_LINES, 0.0)
    rest: dict[str, float] = {}
    for name, time_taken in result.profile.items():
        line = next((line for line, names in _LINES.items() if name.startswith(tuple(names.split()))), None)
        if line is None:
            rest[name] = time_taken
        else:
            seconds[line] += time_taken
    most = ", ".join(sorted(rest, key=lambda name: -rest[name])[:4])
    seconds[f"other operations ({most} ...)"] = sum(rest.values())
    seconds["outside operations"] = total - sum(seconds.values())
    return "\n".join(f"{taken / total:>7.1%}  {line}" for line, taken in seconds.items())


def roofline_seconds(
    config: GPT2Config,
    batch: int,
    length: int,
    library: str = "torch.mm",
    repeats: int = 3,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Seconds that the matrix products of a step, forward and backward, take by themselves: each shape is timed with
    torch.mm in `dtype`, or as the model makes it (the best of `repeats`), and attention is charged at the rate of the
    fastest of them."""
    N, C = batch * length, config.n_embd
    tiles = library != "torch.mm" and dtype == torch.bfloat16
    rows, V = chunk_shape(N, config.vocab_size, dtype=dtype, tiles=tiles)  # chunks of the head, whose rows are padded
    block = [(N, C, 3 * C), (N, C, C), (N, C, config.inner), (N, config.inner, C)]
    products: list[tuple[float, tuple[int, int, int], bool]] = [(config.n_layer, shape, False) for shape in block]
    products.append((N / rows, (rows, C, V), True))  # the head lies as the embedding does
    total = rate = 0.0
    for times, (n, a, b), head in products:
        x, y = torch.randn(n, a).to(dtype), torch.randn(n, b).to(dtype)
        w = torch.randn(b, a).t() if head else torch.randn(a, b)
        w = w if tiles else w.to(dtype)  # tiles cast it themselves
        out, grad_x, grad_w = (
            torch.empty_like(y),
            torch.empty_like(x),
            torch.zeros(*(w.t() if head else w).shape, dtype=torch.float32 if tiles else dtype),
        )
        calls: list[Callable[[], object]]
        if library == "torch.mm":
            left, right = (y.t(), x) if head else (x.t(), y)
            calls = [
                functools.partial(torch.mm, x, w, out=out),
                functools.partial(torch.mm, y, w.t(), out=grad_x),
                functools.partial(torch.mm, left, right, out=grad_w),
            ]
        else:
            calls = [functools.partial(multiply, x, w), functools.partial(multiply, y, w.t())]
            calls += [
                functools.partial(add_transposed_product, grad_w, y, x, first=False)
                if head
                else functools.partial(weight_gradient, x, y)
            ]
        seconds = sum(_best(call, repeats) for call in calls)
        total += times * seconds
        rate = max(rate, 6 * n * a * b / seconds)
    attention = 7 * batch * length * length * C * config.n_layer  # 7 products, half of each above the diagonal
    return total + attention / rate


def _best(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
