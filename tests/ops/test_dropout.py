"""Dropout into the residual stream: the documented mask, its gradient, and nothing kept but a seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minigpt2.ops.attention.fused import dropout_mask
from minigpt2.ops.dropout import dropout_add

pytestmark = pytest.mark.usefixtures("needs_the_kernel")


def mask(seed: Tensor, rows: int, width: int, p: float) -> Tensor:
    """The mask of attention's head 0."""
    n = max(rows, width)
    return dropout_mask(int(seed), 1, 1, n, p)[0, 0, :rows, :width]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 16, 63, 64, 100, 192])
@pytest.mark.parametrize("with_residual", [False, True])
def test_value_and_gradient_are_those_of_the_documented_mask(
    dtype: torch.dtype, width: int, with_residual: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 50, width).to(dtype).requires_grad_()
    residual = torch.randn(3, 50, width).to(dtype).requires_grad_() if with_residual else None
    state = torch.get_rng_state()
    out = dropout_add(x, residual, 0.3)
    torch.set_rng_state(state)
    factor = mask(torch.randint(0, 2**63 - 1, (), dtype=torch.int64), 150, width, 0.3).view(3, 50, width).double() / 0.7
    expected = x.detach().double() * factor + (0 if residual is None else residual.detach().double())
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out.detach().double(), expected, **tolerance)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), grad.double() * factor, **tolerance)
    if residual is not None:
        assert residual.grad is not None
        assert torch.equal(residual.grad, grad)


def test_no_tensor_is_kept() -> None:
    saved: list[Tensor] = []
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout_add(x * 2, x, 0.1)
    assert not saved


def test_rate_and_independence_of_threads(threads: Callable[[int], None]) -> None:
    x = torch.ones(1000, 768)
    outputs = []
    for n in (1, 2, 3):
        threads(n)
        torch.manual_seed(1)
        outputs.append(dropout_add(x, None, 0.1))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    rate = (outputs[0] > 0).double().mean().item()
    assert abs(rate - 0.9) < 4 * math.sqrt(0.09 / x.numel())


def test_opcheck() -> None:
    seed = torch.tensor(5)
    for residual in (None, torch.randn(4, 20, requires_grad=True)):
        arguments = (torch.randn(4, 20, requires_grad=True), residual, 0.2, seed)
        torch.library.opcheck(torch.ops.minigpt2.dropout_add.default, arguments)


def test_no_dropout_is_the_sum() -> None:
    x, residual = torch.randn(2, 4, 8)
    assert torch.equal(dropout_add(x, residual, 0.0), residual + x)
    assert dropout_add(x, None, 0.0) is x


def test_under_autocast_a_float32_residual_takes_a_bfloat16_addition() -> None:
    x, residual = torch.ones(4, 64, dtype=torch.bfloat16), torch.ones(4, 64)
    out = dropout_add(x, residual, 0.5)
    assert out.dtype == torch.float32
    assert set(out.flatten().tolist()) == {1.0, 3.0}
