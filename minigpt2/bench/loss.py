"""Head and loss, forward and backward, beside torch.nn.functional.linear_cross_entropy (torch >= 2.13)."""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F

from minigpt2.bench.header import header
from minigpt2.bench.worker import end_with
from minigpt2.config import GPT2Config
from minigpt2.device import peak_bytes, resident_bytes
from minigpt2.loss import chunk_shape, linear_cross_entropy
from minigpt2.ops.allocator import tune_allocator

__all__ = ["bench_loss"]


def bench_loss(
    model: str = "gpt2", *, tokens: int = 4096, rounds: int = 5, bfloat16: bool = False
) -> dict[str, tuple[list[float], int]]:
    """Measure time and memory of the loss, from the last hidden states on, beside PyTorch's own.
    $ minigpt2 bench loss --tokens 2048

    Times are taken in turn, with the gradients; a ratio is that within a round. A peak is that of the memory above the
    operands, in a process of its own.

    Args:
        model: An official name, for the shape.
        tokens: Tokens in the batch.
        rounds: How often each is timed, after a warm-up.
        bfloat16: Under autocast.

    Returns:
        The seconds of each round and the peak in bytes.
    """
    if min(rounds, tokens) < 1:
        raise ValueError("tokens and rounds must be >= 1")
    config = GPT2Config.official(model)
    print(header("loss"))
    dtype = "bfloat16 autocast" if bfloat16 else "float32"
    print(f"{model}, {tokens} tokens, {dtype}; {rounds} rounds; {tune_allocator()}")
    shape = tokens, config.n_embd, config.vocab_size, bfloat16
    libraries = ["minigpt2", "torch"] if hasattr(F, "linear_cross_entropy") else ["minigpt2"]
    steps = [_step(library, *shape) for library in libraries]
    seconds = [[timeit.timeit(step, number=1) for step in steps] for _ in range(rounds + 1)][1:]
    found = {}
    for i, library in enumerate(libraries):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with, (os.getpid(),)) as pool:
            times, peak = found[library] = [row[i] for row in seconds], pool.submit(_peak, library, shape).result()
        ratios = sorted(row[i] / row[0] for row in seconds)
        ratio = f"{statistics.median(ratios):.2f} x [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"{library:<8}: {statistics.median(times):.2f} s, {ratio}, {peak / 2**20:.0f} MiB", flush=True)
    return found


def _step(library: str, n: int, width: int, vocab: int, bfloat16: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    # Of the size that they have in GPT-2: large logits would slow products down by numbers that are nearly zero.
    hidden = torch.randn(n, width, requires_grad=True)
    weight = torch.randn(vocab, width).mul_(GPT2Config().initializer_range).requires_grad_()
    targets = torch.randint(vocab, (n,))
    loss: Callable[..., torch.Tensor] = linear_cross_entropy
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    if library == "torch":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_shape(n, vocab, dtype=dtype)[0])
        loss = functools.partial(F.linear_cross_entropy, options=options)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss(hidden, weight, targets)
        value.backward()
        hidden.grad = weight.grad = None

    return step


def _peak(library: str, shape: tuple[int, int, int, bool]) -> int:
    tune_allocator()
    _step(library, 2, 16, 32, shape[-1])()  # what is imported and set up once
    step = _step(library, *shape)
    held = resident_bytes()
    step()
    return peak_bytes(torch.device("cpu")) - held
