"""Greedy generation: tokens a second, beside transformers' `generate`, and how far it is from what memory allows.

Both libraries load the same random weights from one folder, and should produce the same ids. In each round both
generate, one after the other in one process; a ratio is taken within its round.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from minigpt2.bench.header import header
from minigpt2.config import OFFICIAL_SIZES, GPT2Config
from minigpt2.model import GPT2

__all__ = ["Generation", "bench_generate", "memory_rates"]

Generate = Callable[[Tensor, int], Tensor]


@dataclasses.dataclass(frozen=True)
class Generation:
    """One batch size, in medians over rounds."""

    batch: int
    seconds: dict[str, float]
    """A whole generation, with the pass over the prompt, by the name of the library."""
    weight_bytes: int
    """Read for every token."""
    share: float
    """Of the memory-bandwidth limit: the time of reading the weights once a token, over the time taken."""
    share_with_cache: float
    """The same, where the cache of keys and values is read too."""
    ratio: tuple[float, float, float] | None
    """The time of transformers over ours, with its least and largest value; None without transformers."""
    same_ids: bool
    """Whether all libraries produced the same ids."""


def bench_generate(
    model: str = "gpt2",
    *,
    batches: tuple[int, ...] = (1, 8),
    tokens: int = 512,
    prompt: int = 16,
    rounds: int = 5,
    dtype: Literal["float32", "bfloat16"] = "float32",
    compare: bool = True,
    config: Annotated[dict[str, int] | None, tyro.conf.Suppress] = None,
) -> list[Generation]:
    """Measure generation: tokens a second, beside transformers and the limit of memory bandwidth.
    $ minigpt2 bench generate --batches 1 8 --tokens 128

    The limit is the time of reading every weight once a token, at the rate that summing a large tensor reaches in the
    same run. All in `dtype`, greedy.

    Args:
        model: An official name, for the shape; the weights are random.
        batches: Numbers of sequences to generate at once.
        tokens: New tokens in each.
        prompt: Tokens in the prompt.
        rounds: How often everything is measured, in turn.
        dtype: Of the weights and the cache, of both libraries; bfloat16 also runs minigpt2 in float32, alternately.
        compare: Also measure transformers, if it is installed.
        config: Fields of GPT2Config: another shape than the official one.
    """
    if model not in OFFICIAL_SIZES:
        raise ValueError(f"model must be one of {', '.join(OFFICIAL_SIZES)}, got {model!r}")
    if min(tokens, prompt, rounds, *batches) < 1:
        raise ValueError("batches, tokens, prompt and rounds must be >= 1")
    torch.manual_seed(0)
    network = GPT2(GPT2Config().replace(**(config or OFFICIAL_SIZES[model])))
    shape = network.config
    if prompt + tokens > shape.n_positions:
        raise ValueError(f"{prompt} + {tokens} tokens do not fit the context length {shape.n_positions}")
    itemsize = getattr(torch, dtype).itemsize
    weight_bytes = itemsize * (sum(p.numel() for p in network.parameters()) - network.wpe.weight.numel())
    print(header("generate"))
    print(f"{model}, {prompt} + {tokens} tokens, greedy, {dtype}; medians of {rounds} rounds")
    libraries = _loaded(network, compare, dtype)
    del network
    found = []
    for batch in batches:
        ids = torch.randint(shape.vocab_size, (batch, prompt))
        outputs, seconds, (read, copy) = _in_turn(libraries, ids, tokens, rounds)
        ours = statistics.median(seconds["minigpt2"])
        # Token t reads prompt + t - 1 keys and as many values in each layer; the first token is the prompt's own.
        cached = prompt + (tokens - 1) / 2
        cache_bytes = itemsize * 2 * shape.n_layer * batch * cached * shape.n_embd
        ratio = None
        if "transformers" in seconds:
            ratios = [t / o for t, o in zip(seconds["transformers"], seconds["minigpt2"], strict=True)]
            ratio = statistics.median(ratios), min(ratios), max(ratios)
        row = Generation(
            batch=batch,
            seconds={name: statistics.median(times) for name, times in seconds.items()},
            weight_bytes=weight_bytes,
            share=weight_bytes / read / (ours / tokens),
            share_with_cache=(weight_bytes + cache_bytes) / read / (ours / tokens),
            ratio=ratio,
            same_ids=torch.equal(outputs.get("transformers", outputs["minigpt2"]), outputs["minigpt2"]),
        )
        print(f"batch {batch}: memory is read at {read / 1e9:.1f} GB/s (and copied at {copy / 1e9:.1f}, both ways)")
        for name, times in seconds.items():
            taken = [f"{batch * tokens / t:.1f}" for t in (row.seconds[name], max(times), min(times))]
            print(f"{name:>12}: {{}} tokens/s [{{}}, {{}}]".format(*taken))
        print(
            f"    minigpt2: {ours / tokens * 1e3:.1f} ms a token, {row.share:.0%} of the memory-bandwidth limit "
            f"({weight_bytes / 1e6:.0f} MB of weights a token; with {cache_bytes / 1e6:.0f} MB of cache, on average, "
            f"{row.share_with_cache:.0%})"
        )
        _print_ratios(row, seconds, dtype)
        found.append(row)
    return found


def _in_turn(
    libraries: dict[str, Generate], ids: Tensor, tokens: int, rounds: int
) -> tuple[dict[str, Tensor], dict[str, list[float]], tuple[float, float]]:
    """What each library made of the prompts, its seconds in each round, and the rates of memory, medians."""
    outputs = {name: generate(ids, min(tokens, 8)) for name, generate in libraries.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in libraries}
    rates = []
    for _ in range(rounds):
        rates.append(memory_rates())
        for name, generate in libraries.items():
            start = time.perf_counter()
            outputs[name] = generate(ids, tokens)
            seconds[name].append(time.perf_counter() - start)
    read, copy = (statistics.median(rate) for rate in zip(*rates, strict=True))
    return outputs, seconds, (read, copy)


def _print_ratios(row: Generation, seconds: dict[str, list[float]], dtype: str) -> None:
    if "float32" in seconds:
        gains = [t / o for t, o in zip(seconds["float32"], seconds["minigpt2"], strict=True)]
        spread = f"[{min(gains):.2f}, {max(gains):.2f}]"
        print(f"    {dtype} is {statistics.median(gains):.2f} x as fast as float32 {spread}")
    if row.ratio is not None:
        same = "the same ids" if row.same_ids else "OTHER ids"
        print("    minigpt2 is {:.2f} x as fast [{:.2f}, {:.2f}], with ".format(*row.ratio) + same, flush=True)


def memory_rates(size: int = 2**28) -> tuple[float, float]:
    """Bytes a second that are read where a tensor of `size` bytes is summed, and read or written where it is copied."""
    source = torch.ones(size // 4)
    target = torch.ones(size // 4)
    times = []
    for call in (source.sum, lambda: target.copy_(source)):
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        times.append(best)
    return size / times[0], 2 * size / times[1]


def _greedy(model: GPT2) -> Generate:
    return lambda ids, n: model.generate(ids, n, temperature=0)


def _loaded(network: GPT2, compare: bool, dtype: str) -> dict[str, Generate]:
    """What generates, by name, each from what `network` was saved as."""
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        libraries: dict[str, Generate] = {
            "minigpt2": _greedy(GPT2.from_pretrained(folder, dtype=getattr(torch, dtype)))
        }
        if dtype != "float32":
            libraries["float32"] = _greedy(GPT2.from_pretrained(folder))
        if compare:
            try:
                from transformers import GPT2LMHeadModel
            except ImportError:
                print("transformers is not installed, so there is no comparison: pip install transformers")
                return libraries
            theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            theirs.generation_config.eos_token_id = None  # both go on to the last token

            def generate(ids: Tensor, n: int) -> Tensor:
                mask = torch.ones_like(ids)
                return theirs.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)

            libraries["transformers"] = generate
    return libraries
