"""What the matrix products of training are computed in, while weights and sums stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from minigpt2.ops.products import bfloat16_unit

__all__ = ["DTYPES", "autocast", "fastest_precision", "resolve_precision"]

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fastest_precision(device: torch.device) -> tuple[Precision, str]:
    """The fastest precision for training there, and why.

    On a CPU it is bf16 where the processor multiplies bfloat16 (AMX, or AVX512_BF16 as in AMD's Zen 4 and Zen 5 and in
    Intel's Cooper Lake): elsewhere such products are made of float32 ones and gain nothing. On CUDA it is bf16 from
    compute capability 8.0 on, whose tensor cores are the first to take it, and fp16 before.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "bf16", "its tensor cores multiply bfloat16"
        return "fp16", "its tensor cores multiply float16 only"
    if device.type == "cpu":
        unit = bfloat16_unit()
        return ("bf16", f"the processor has {unit}") if unit else ("fp32", "the processor has no products of bfloat16")
    return "fp32", f"{device.type} gains nothing by another"


def resolve_precision(precision: Precision | Literal["auto"], device: torch.device) -> Precision:
    """`precision`, where it is not auto, or the fastest there."""
    return fastest_precision(device)[0] if precision == "auto" else precision


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Matrix products in `precision`, the rest in float32."""
    if precision == "fp32":
        return nullcontext()
    # Without its cache, which would keep a copy of every weight alive and helps only weights that are used twice.
    return torch.autocast(device.type, DTYPES[precision], cache_enabled=False)
