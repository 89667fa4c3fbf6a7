"""AdamW whose moments take two bytes an element, or one, instead of four.

The arithmetic is float32's (Loshchilov & Hutter 2019, arXiv:1711.05101); the moments are read before it and rounded
after it:

- bfloat16, for both;
- 8 bits, floats of four bits of fraction times one float32 scale for each block of 64 elements of a row, the largest of
  its moments. The first moment has a sign and 8 powers of two, the second none and 16. One scale for many elements is
  the idea of Dettmers et al. 2022, arXiv:2110.02861; that the codes are floats makes small moments as exact as large
  ones.

Both are rounded at random, up or down in proportion to the distance, so that what is too small to change a code changes
it now and then, by as much in the mean: to nearest, a second moment in bfloat16 with beta2 = 0.999 would never move.
The random bits are a function of seed, row and column, so a step can be repeated. A second moment other than 0 is
never rounded to 0, by whose root the step is divided, but is the least code at least, which makes the step smaller.

What is rounded at every step wanders. The second moment moves by about 1 - beta2 of its value, and so by a whole code,
which is d of its value, with a chance of (1 - beta2) / d: its variance settles at d / 2 of its square, of which a bit
more halves. For four bits there are too few powers of two for a whole row: in one of c_attn the second moments of
queries and keys can be less than 2^-16 of those of values. 64 is the width of a head of GPT-2.

On the CPU it is a function of the compiled kernel (csrc/adamw.cpp); elsewhere, or without a compiler, this file's
tensor operations, a few million elements at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt2.ops import kernel

__all__ = ["CODES", "DTYPES", "Step", "adamw_step", "decode", "encode"]

DTYPES = {"bf16": torch.bfloat16, "8bit": torch.uint8}
"""What the moments are stored in."""

_ELEMENTS = 2**22
"""As many at a time as the tensor operations work on."""

# Bits of fraction, and the largest code of the first and of the second moment.
_FRACTION, _LARGEST = 4, (127, 255)
_SHIFT = 23 - _FRACTION

CODES = f"floats of {_FRACTION} bits of fraction, blocks of {kernel.ADAMW_BLOCK}"
"""What moments in 8 bits are; a snapshot says it."""


class Step(NamedTuple):
    """The numbers of one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    number: int
    """Which step it is, from 1 on."""


def adamw_step(
    p: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    step: Step,
    seed: int,
    first_row: int = 0,
) -> None:
    """Move p, a float32 matrix (rows, columns), by its gradient, in place, and with it its two moments, in bfloat16 or
    uint8, and of uint8 ones the scales, float32 (rows, adamw_blocks(columns)). `seed` (32 bits) and the number of p's
    first row in the whole matrix decide the rounding. All tensors contiguous, on one device."""
    correction1, correction2 = (1 - beta**step.number for beta in (step.beta1, step.beta2))
    keep = 1 - step.lr * step.weight_decay
    numbers = (step.lr, step.beta1, step.beta2, step.eps, keep, correction1, correction2)
    grad = grad.contiguous()
    if kernel.serves(p):
        kernel.adamw(p, grad, *moments, scales, numbers, seed, first_row)
        return
    rows = max(1, _ELEMENTS // max(1, p.size(1)))
    for start in range(0, p.size(0), rows):
        part = slice(start, start + rows)
        some = None if scales is None else (scales[0][part], scales[1][part])
        _step(p[part], grad[part], (moments[0][part], moments[1][part]), some, numbers, seed, first_row + start)


def _step(
    p: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    numbers: tuple[float, ...],
    seed: int,
    first_row: int,
) -> None:
    lr, beta1, beta2, eps, keep, correction1, correction2 = numbers
    first, second = (decode(m, None if scales is None else scales[i], second=i == 1) for i, m in enumerate(moments))
    first = first * beta1 + grad * (1 - beta1)
    second = second * beta2 + grad * grad * (1 - beta2)
    p.mul_(keep).sub_(first / (second.sqrt() / math.sqrt(correction2) + eps) * (lr / correction1))
    for i, (values, words) in enumerate(zip((first, second), random_words(p, seed, first_row), strict=True)):
        code, scale = encode(values, words, scaled=scales is not None, second=i == 1)
        moments[i].copy_(code)
        if scales is not None and scale is not None:
            scales[i].copy_(scale)


def decode(code: Tensor, scale: Tensor | None, *, second: bool) -> Tensor:
    """The moments, float32, of what is stored; `second` for those without a sign."""
    if scale is None:
        return code.float()
    wide, largest = code.int(), _LARGEST[second]
    size = wide & largest
    values = torch.where(size > 0, (size + _base(second)) << _SHIFT, 0).view(torch.float32)
    return torch.where(wide > largest, -values, values) * _of_elements(scale, code.size(1))


def encode(values: Tensor, random: Tensor, *, scaled: bool, second: bool) -> tuple[Tensor, Tensor | None]:
    """What to store of moments, float32 (rows, columns), and the scales where it is `scaled`; `random`: a word of 32
    bits for each, in int64."""
    if not scaled:
        bits = (values.view(torch.int32) + (random & 0xFFFF).int()) & -0x10000
        return bits.view(torch.float32).bfloat16(), None
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values.abs(), (0, -columns % kernel.ADAMW_BLOCK))
    scale = padded.view(rows, kernel.adamw_blocks(columns), kernel.ADAMW_BLOCK).amax(2)
    relative = values * _of_elements(torch.where(scale > 0, 1 / scale, 0), columns)
    size, random, least = relative.abs(), (random & ((1 << _SHIFT) - 1)).int(), _least(second)
    below = size > 0 if second else size * (2**_SHIFT / least) > random
    code = ((size.view(torch.int32) + random) >> _SHIFT) - _base(second)
    code = torch.where(size < least, below.int(), code).clamp(max=_LARGEST[second])
    return (code if second else code | (relative.view(torch.int32) < 0).int() << 7).to(torch.uint8), scale


def _base(second: bool) -> int:
    """What a code, but 0, has to be added to for the bits of float32 above the last `_SHIFT`: the largest is 1."""
    return (127 << _FRACTION) - _LARGEST[second]


def _least(second: bool) -> float:
    """What code 1 stands for."""
    return torch.tensor((_base(second) + 1) << _SHIFT, dtype=torch.int32).view(torch.float32).item()


def _of_elements(scale: Tensor, columns: int) -> Tensor:
    """For each element what its block has."""
    return scale.repeat_interleave(kernel.ADAMW_BLOCK, 1)[:, :columns]


def random_words(like: Tensor, seed: int, first_row: int) -> tuple[Tensor, Tensor]:
    """Two words of 32 bits, in int64, for each element of a matrix whose first row has the number `first_row`: those of
    csrc/adamw.cpp."""
    rows = torch.arange(first_row, first_row + like.size(0), device=like.device)
    columns = torch.arange(like.size(1), device=like.device)
    key = _mix(_mix(torch.tensor(seed, device=like.device)) ^ rows)[:, None]
    x = _mix((columns * 0x9E3779B9 + key) & 0xFFFFFFFF)
    y = x * 0x2C1B3C6D & 0xFFFFFFFF
    return x, y ^ y >> 12


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFF
    return x ^ x >> 16
