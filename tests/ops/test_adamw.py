"""AdamW with moments in fewer bytes: the kernel against its definition, and what the rounding is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minigpt2.ops import adamw, kernel
from minigpt2.ops.adamw import DTYPES, Step, adamw_step, decode, encode, random_words

KINDS = ["bf16", "8bit"]


def state(shape: tuple[int, int], kind: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    moments = torch.zeros(shape, dtype=DTYPES[kind]), torch.zeros(shape, dtype=DTYPES[kind])
    scales = torch.zeros(shape[0], kernel.adamw_blocks(shape[1])), torch.zeros(shape[0], kernel.adamw_blocks(shape[1]))
    return moments, None if kind == "bf16" else scales


@pytest.mark.skipif(kernel.unavailable() is not None, reason="no compiled kernel here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (70, 100), (2, 1000), (0, 8)])
def test_the_kernel_is_its_definition(monkeypatch, kind: str, shape: tuple[int, int]) -> None:
    """But for what a fused multiplication and addition rounds otherwise, which now and then is a code."""
    torch.manual_seed(0)
    fast = torch.randn(shape)
    slow = fast.clone()
    kept_fast, kept_slow = state(shape, kind), state(shape, kind)
    monkeypatch.setattr(adamw, "_ELEMENTS", 200)
    for number in range(1, 7):
        grad = torch.randn(shape) * torch.logspace(-9, 2, shape[1])
        grad[: number % 2] = 0
        numbers = Step(0.01, 0.9, 0.95, 1e-8, 0.1, number)
        adamw_step(fast, grad, *kept_fast, numbers, 77 * number, 5)
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "serves", lambda _: False)
            adamw_step(slow, grad, *kept_slow, numbers, 77 * number, 5)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-3 * 0.01 * 6)
    for a, b in zip(kept_fast[0], kept_slow[0], strict=True):
        assert (a != b).sum() <= a.numel() * 0.002


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_adamw_in_float32(kind: str) -> None:
    """The rounding comes after it."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(20, 33))
    ours, p.grad = p.detach().clone(), torch.randn(20, 33)
    theirs = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    theirs.step()
    adamw_step(ours, p.grad, *state((20, 33), kind), Step(0.01, 0.9, 0.95, 1e-8, 0.1, 1), 3)
    torch.testing.assert_close(ours, p.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_right_in_the_mean(kind: str, second: bool) -> None:
    least = adamw._least(second) if kind == "8bit" else 0.0
    step = 2**-adamw._FRACTION if kind == "8bit" else 2**-7
    values = torch.logspace(0, math.log10(least / 16) if least else -8, 64)
    coded = values >= least
    values = values if second else values * torch.where(torch.arange(64) % 2 > 0, 1, -1)
    repeated = values.expand(20_000, -1).contiguous()
    words = random_words(repeated, 1, 0)[second]
    code, scale = encode(repeated, words, scaled=kind == "8bit", second=second)
    found = decode(code, scale, second=second)
    assert ((found - values).abs() <= values.abs() * step * 1.01)[:, coded].all()
    torch.testing.assert_close(found.mean(0)[coded], values[coded], rtol=1e-3, atol=0)
    if not second:  # below the least code it is that code now and then
        torch.testing.assert_close(found.mean(0), values, rtol=0.2, atol=1e-7)
    elif not coded.all():  # below the least code it is that code
        assert (found[:, ~coded] == least).all()
    assert torch.equal(found.sign(), values.sign().expand_as(found)) or not second


def test_rows_are_rounded_by_their_number() -> None:
    """So that a part of a matrix makes the step that it makes in the whole."""
    torch.manual_seed(0)
    whole, grad, numbers = torch.randn(6, 40), torch.randn(6, 40), Step(0.01, 0.9, 0.95, 1e-8, 0.1, 1)
    part, kept, kept_part = whole[4:].clone(), state((6, 40), "8bit"), state((2, 40), "8bit")
    adamw_step(whole, grad, *kept, numbers, 9)
    adamw_step(part, grad[4:], *kept_part, numbers, 9, first_row=4)
    assert torch.equal(whole[4:], part)
    for a, b in zip(kept[0], kept_part[0], strict=True):
        assert torch.equal(a[4:], b)
    other = state((2, 40), "8bit")
    adamw_step(part, grad[4:], *other, numbers, 9, first_row=0)
    assert not torch.equal(other[0][0], kept_part[0][0])


@pytest.mark.skipif(kernel.unavailable() is not None, reason="no compiled kernel here")
def test_the_kernel_checks_what_it_is_given() -> None:
    p, numbers = torch.zeros(4, 8), (0.0,) * 7
    (first, second), scales = state((4, 8), "8bit")
    with pytest.raises(ValueError, match="must be float32 matrices"):
        kernel.adamw(p, p[:2], first, second, scales, numbers, 0, 0)
    with pytest.raises(ValueError, match=r"moments torch.uint8 of their shape"):
        kernel.adamw(p, p, first, second.bfloat16(), scales, numbers, 0, 0)
    with pytest.raises(ValueError, match=r"uint8 with scales and bfloat16 without, not torch.uint8"):
        kernel.adamw(p, p, first, second, None, numbers, 0, 0)
    with pytest.raises(ValueError, match=r"scales must be float32 \(4, 1\)"):
        kernel.adamw(p, p, first, second, (p, p), numbers, 0, 0)
    with pytest.raises(ValueError, match="must be contiguous"):
        kernel.adamw(torch.zeros(8, 4).T, p, first, second, scales, numbers, 0, 0)
