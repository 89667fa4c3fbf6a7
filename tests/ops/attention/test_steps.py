"""Each step from the definition of attention to the kernel is equal to the one before."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minigpt2.ops.attention import steps
from minigpt2.ops.attention.eager import causal_mask, eager_attention

T, D, SEED = 50, 16, 0x0123_4567_89AB_CDEF
equal = partial(assert_close, rtol=1e-11, atol=1e-12)


@pytest.fixture(params=["no dropout", "dropout"])
def dropout(request: pytest.FixtureRequest) -> steps.Dropout:
    return steps.none if request.param == "no dropout" else steps.from_counter(SEED, 0, 0.1)


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout, with scores far apart, so that the running maximum grows and matters."""
    q, k, v, dout = torch.randn(4, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 8 * q, k, v, dout


def test_the_definition_is_that_of_eager() -> None:
    q, k, v, _ = tensors()
    found = eager_attention(q[None, None], k[None, None], v[None, None], causal_mask(T, T, q.device))
    equal(steps.definition(q, k, v), found[0, 0])


def test_row_by_row_is_the_definition(dropout: steps.Dropout) -> None:
    q, k, v, _ = tensors()
    out, lse = steps.row_by_row(q, k, v, dropout)
    equal(out, steps.definition(q, k, v, dropout))
    equal(lse, (q @ k.T / D**0.5).masked_fill(~causal_mask(T, T, q.device), -torch.inf).logsumexp(1))


@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (7, 5), (100, 1)])
def test_in_tiles_is_row_by_row(dropout: steps.Dropout, rows: int, keys: int) -> None:
    q, k, v, _ = tensors()
    equal(steps.in_tiles(q, k, v, dropout, rows, keys), steps.row_by_row(q, k, v, dropout))


def test_large_scores_do_not_overflow() -> None:
    q, k, v, _ = tensors()
    assert (1000 * q @ k.T).exp().isinf().any()
    equal(steps.in_tiles(1000 * q, k, v)[0], steps.definition(1000 * q, k, v))


def test_backward_is_the_gradient_of_the_definition(dropout: steps.Dropout) -> None:
    *inputs, dout = tensors()
    leaves = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(steps.definition(*leaves, dropout), leaves, dout)
    equal(steps.backward(dout, *(x.detach() for x in leaves), dropout), expected)


@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (7, 5), (100, 1)])
def test_backward_in_tiles_is_backward(dropout: steps.Dropout, rows: int, keys: int) -> None:
    q, k, v, dout = tensors()
    kept = steps.in_tiles(q, k, v, dropout)
    equal(steps.backward_in_tiles(dout, q, k, v, *kept, dropout, rows, keys), steps.backward(dout, q, k, v, dropout))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_kernel_is_the_tiles(p: float) -> None:
    """The C++, for the second head of two, forward and backward."""
    q, k, v, dout = tensors()
    beside = torch.randn(4, T, D, dtype=torch.float64)  # another head
    qkv = torch.cat([part for pair in zip(beside[:3], (q, k, v), strict=True) for part in pair], 1)[None]
    qkv.requires_grad_()
    seed = torch.tensor(SEED)
    out, lse = torch.ops.minigpt2.attention(qkv, 2, p, seed if p else None)
    out.backward(torch.cat([beside[3], dout], 1)[None])
    dropout = steps.from_counter(SEED, 1, p) if p else steps.none
    kept = steps.in_tiles(q, k, v, dropout)
    equal(out[0, :, D:], kept[0])
    equal(lse[0, 1], kept[1])
    gradients = qkv.grad.view(T, 3, 2, D)[:, :, 1].unbind(1)
    assert_close(gradients, steps.backward_in_tiles(dout, q, k, v, *kept, dropout), rtol=1e-9, atol=1e-10)
