"""How fast the fused attention kernel is, against scaled_dot_product_attention and against a matrix product.

Every round times everything once, one after the other in one process, from the same packed tensor, so that what slows
the machine slows all of them; the figures are medians over rounds, and a ratio is taken within its round. Each call
allocates its own output and gradient, for both. On CUDA the device is waited for before and after the calls of a
measurement. Everything runs once before the first round, in which CUDA's tiles are chosen. On the CPU bfloat16 is timed
beside the kernel's own float32 too: what it gains where the processor multiplies it. A forward pass is 2 matrix
products and a backward pass 5 (one of them rebuilds the scores), each 2 * T^2 * D operations a head; half of that is
counted, because half of the pairs are masked.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from minigpt2.bench.header import header
from minigpt2.device import pick_device, synchronize
from minigpt2.ops.attention import attention
from minigpt2.ops.attention.fused import decode, unavailable
from minigpt2.ops.products import multiply, onednn_serves

SHAPES = ((8, 256), (4, 1024), (1, 4096))  # (B, T)
DECODE_SHAPES = ((1, 64), (1, 256), (1, 1024), (8, 64), (8, 256), (8, 1024))
PEER = "sdpa"
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One pass of one shape. Rates in GFLOP/s; ratio is sdpa's time over ours, with its least and largest value, and so
    is over_float32 of the kernel's own time with float32 tensors, where these are bfloat16 ones on the CPU."""

    B: int
    T: int
    dropout_p: float
    backward: bool
    rate: float
    ratio: float
    ratio_range: tuple[float, float]
    share_of_mm: float
    price_of_dropout: float  # time over the time with the first dropout_p, minus 1
    over_float32: float | None
    over_float32_range: tuple[float, float] | None


def bench_attention(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    n_head: int = 12,
    head_dim: int = 64,
    dropouts: Sequence[float] = (0.0, 0.1),
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    repeats: int = 7,
    least_seconds: float = 0.1,
    decode_shapes: Sequence[tuple[int, int]] = DECODE_SHAPES,
) -> list[Measurement]:
    """Time minigpt2's attention beside PyTorch's, in training and in generation.
    $ minigpt2 bench attention --shapes 4 1024 --repeats 3

    On CUDA only training is timed, and a line at the end says whether minigpt2's was the faster at every shape.

    Args:
        shapes: Pairs: sequences in a batch, and tokens in each.
        n_head: Attention heads.
        head_dim: Width of a head.
        dropouts: Dropout probabilities; the price of each is over the first.
        dtype: What the tensors are; float16 on CUDA only.
        device: cpu, cuda or cuda:N; auto is CUDA, else the CPU.
        repeats: Rounds, each of which times everything once.
        least_seconds: A measurement repeats its call for at least so long.
        decode_shapes: Pairs: sequences in a batch, and tokens in the cache that one query reads.

    Returns:
        The rows of training.
    """
    torch.manual_seed(0)
    tensors, place = getattr(torch, dtype), pick_device(device)
    reason = unavailable(place, tensors, head_dim)
    if reason is not None:
        raise ValueError(f"there is nothing to measure: {reason}")
    print(header("attention"))
    on = f"{torch.cuda.get_device_name(place)}, " if place.type == "cuda" else ""
    print(f"{on}{dtype}, H = {n_head}, D = {head_dim}; medians of {repeats} rounds")
    print(
        f"{'shape':>10} {'p':>4} {'pass':>8} {'GFLOP/s':>8} {'x sdpa':>7} {'(range)':>14} {'of mm':>6} {'dropout':>8}"
        + (f" {'x float32':>9} {'(range)':>14}" if _beside_float32(tensors, place) else "")
    )
    rows = []
    for B, T in shapes:
        for row in _bench_shape(B, T, n_head, head_dim, dropouts, tensors, place, repeats, least_seconds):
            low, high = row.ratio_range
            beside = ""
            if row.over_float32_range is not None:
                beside = f" {row.over_float32:>9.2f} {'({:.2f}-{:.2f})'.format(*row.over_float32_range):>14}"
            print(
                f"{f'B{B} T{T}':>10} {row.dropout_p:>4} {'fwd+bwd' if row.backward else 'fwd':>8} {row.rate:>8.0f}"
                f" {row.ratio:>7.2f} {f'({low:.2f}-{high:.2f})':>14} {row.share_of_mm:>6.2f}"
                f" {row.price_of_dropout:>+8.1%}{beside}",
                flush=True,
            )
            rows.append(row)
    if place.type == "cuda" and rows:
        least = min(row.ratio for row in rows if row.backward)
        verdict = "faster" if least > 1 else "not faster"
        print(f"forward and backward: fused is {verdict} than sdpa at every shape; its least ratio is {least:.2f}")
    elif place.type == "cpu":
        if rows and tensors == torch.float32 and onednn_serves(1024**3):
            print(_product_rates(repeats, least_seconds))
        if decode_shapes:
            bench_decode(decode_shapes, n_head=n_head, head_dim=head_dim, dtype=tensors)
    return rows


def _beside_float32(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu"


def _product_rates(repeats: int, least_seconds: float) -> str:
    """The yardstick beside the product that is faster than it on this processor."""
    a, b = torch.randn(2, 1024, 1024)
    seconds = [
        [_seconds(functools.partial(f, a, b), least_seconds) for f in (torch.mm, multiply)] for _ in range(repeats)
    ]
    mm, onednn = (2 * 1024**3 / statistics.median(column) / 1e9 for column in zip(*seconds, strict=True))
    return f"products of 1024 x 1024: torch.mm {mm:.0f} GFLOP/s; oneDNN, which makes the model's here, {onednn:.0f}"


def bench_decode(
    shapes: Sequence[tuple[int, int]] = DECODE_SHAPES,
    *,
    n_head: int = 12,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    repeats: int = 15,
    least_seconds: float = 0.01,
) -> list[float]:
    """Prints and returns the ratio of sdpa's time to ours for one query over a cache of T."""
    print(f"{'decode':>10} {'us':>8} {'x sdpa':>7} {'(range)':>14}")
    ratios = []
    for B, T in shapes:
        k, v = torch.randn(2, B, n_head, max(1024, T), head_dim).to(dtype)[:, :, :, :T]
        q = torch.randn(B, n_head, 1, head_dim).to(dtype)
        rounds = []
        with torch.no_grad():
            for _ in range(repeats):
                ours = _seconds(functools.partial(decode, q, k, v), least_seconds)
                peer = _seconds(
                    functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v), least_seconds
                )
                rounds.append((ours, peer / ours))
        times, found = zip(*rounds, strict=True)
        ratios.append(statistics.median(found))
        print(
            f"{f'B{B} T{T}':>10} {statistics.median(times) * 1e6:>8.0f} {ratios[-1]:>7.2f}"
            f" {f'({min(found):.2f}-{max(found):.2f})':>14}",
            flush=True,
        )
    return ratios


def _bench_shape(
    B: int,
    T: int,
    n_head: int,
    head_dim: int,
    dropouts: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    least_seconds: float,
) -> list[Measurement]:
    qkv = torch.randn(B, T, 3 * n_head * head_dim).to(device, dtype).requires_grad_()
    grad = torch.randn(B, T, n_head * head_dim).to(device, dtype)
    seconds = functools.partial(_seconds, least_seconds=least_seconds, device=device)
    side = 8192 if qkv.is_cuda else 1024  # of the matrix product: enough work for the device
    a, b = torch.randn(2, side, side).to(device, dtype)
    forward_flops = 2 * B * n_head * T * T * head_dim

    in_float32 = (qkv.detach().float().requires_grad_(), grad.float()) if _beside_float32(dtype, device) else None

    def run(backend: str, p: float, backward: bool, inputs: tuple[Tensor, Tensor] = (qkv, grad)) -> None:
        x, grad_out = inputs
        if backward:
            x.grad = None
            attention(x, n_head, dropout_p=p, backend=backend).backward(grad_out)
        else:
            with torch.no_grad():
                attention(x, n_head, dropout_p=p, backend=backend)

    cases = [(p, backward) for p in dropouts for backward in (False, True)]
    mm_rates: list[float] = []
    ours: dict[tuple[float, bool], list[float]] = {case: [] for case in cases}
    peer: dict[tuple[float, bool], list[float]] = {case: [] for case in cases}
    float32: dict[tuple[float, bool], list[float]] = {case: [] for case in cases}
    for p, backward in cases:  # CUDA's tiles are chosen, memory is touched, and the processor wakes
        for warm_up in ("fused", PEER):
            run(warm_up, p, backward)
    for _ in range(repeats):
        mm_rates.append(2 * side**3 / seconds(lambda: torch.mm(a, b)))
        for p, backward in cases:
            ours[p, backward].append(seconds(functools.partial(run, "fused", p, backward)))
            if in_float32:
                float32[p, backward].append(seconds(functools.partial(run, "fused", p, backward, in_float32)))
            peer[p, backward].append(seconds(functools.partial(run, PEER, p, backward)))

    return [
        _measurement(
            B, T, case, forward_flops, mm_rates, ours[dropouts[0], case[1]], ours[case], peer[case], float32[case]
        )
        for case in cases
    ]


def _measurement(
    B: int,
    T: int,
    case: tuple[float, bool],
    forward_flops: float,
    mm_rates: list[float],
    without_dropout: list[float],
    ours: list[float],
    peer: list[float],
    float32: list[float],
) -> Measurement:
    """From the seconds of each round, of the case or as the names say, and the rates of torch.mm."""
    flops = forward_flops * 3.5 if case[1] else forward_flops
    ratios = [y / x for x, y in zip(ours, peer, strict=True)]
    gains = [y / x for x, y in zip(ours, float32, strict=False)]
    return Measurement(
        B=B,
        T=T,
        dropout_p=case[0],
        backward=case[1],
        rate=flops / statistics.median(ours) / 1e9,
        ratio=statistics.median(ratios),
        ratio_range=(min(ratios), max(ratios)),
        share_of_mm=statistics.median(flops / x / mm for x, mm in zip(ours, mm_rates, strict=True)),
        price_of_dropout=statistics.median(x / x0 - 1 for x, x0 in zip(ours, without_dropout, strict=True)),
        over_float32=statistics.median(gains) if gains else None,
        over_float32_range=(min(gains), max(gains)) if gains else None,
    )


def _seconds(call: Callable[[], object], least_seconds: float, device: torch.device = CPU) -> float:
    """Seconds a call, over as many calls as fill `least_seconds`."""
    synchronize(device)
    calls, burst, start = 0, 1, time.perf_counter()
    while True:
        for _ in range(burst):
            call()
        synchronize(device)
        calls += burst
        elapsed = time.perf_counter() - start
        if elapsed >= least_seconds:
            return elapsed / calls
        burst *= 1 if device == CPU else 2  # to wait for a device after every call would be a part of the time
