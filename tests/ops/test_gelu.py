"""The fused GELU: value and gradient against PyTorch's in float64, at the edges too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from minigpt2.ops.gelu import gelu

pytestmark = pytest.mark.usefixtures("needs_the_kernel")

INPUTS = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 50.0, -50.0, 1e4, 1e20])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradient(dtype: torch.dtype) -> None:
    x = INPUTS.to(dtype, copy=True).requires_grad_()
    grad = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.detach().double().requires_grad_()
    expected = exact * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3))
    expected[exact < 1e10].backward(grad.double()[exact < 1e10])
    out = gelu(x)
    out.backward(grad)
    assert x.grad is not None
    assert exact.grad is not None
    gradient = torch.where(exact < 1e10, exact.grad, grad.double())  # where it is 1
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-13)  # the reference is no better than that
    torch.testing.assert_close(out.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), gradient, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (16,), (3, 5, 33), (2, 1 << 14), (40000,)])
def test_shapes_and_strides(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0))[..., 0]
    assert not x.is_contiguous() or x.numel() <= 1
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-6)


def test_nan_and_infinity() -> None:
    x = torch.tensor([float("nan"), float("inf"), 1.0]).requires_grad_()
    out = gelu(x)
    assert out.isnan().tolist() == [True, False, False]
    assert out[1] == torch.inf
    out[0].backward()
    assert x.grad is not None
    assert x.grad[0].isnan()


def test_the_result_does_not_depend_on_threads(threads: Callable[[int], None]) -> None:
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    expected = gelu(x)
    for n in (1, 3):
        threads(n)
        assert torch.equal(gelu(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operation_is_one_of_pytorch() -> None:
    x = torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(torch.ops.minigpt2.gelu.default, (x,))
    assert torch.autograd.gradcheck(torch.ops.minigpt2.gelu, (x.detach().double().requires_grad_(),))
    assert torch.autograd.gradgradcheck(torch.ops.minigpt2.gelu, (x.detach().double().requires_grad_(),))
