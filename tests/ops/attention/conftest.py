import math

import pytest
import torch
from implementations import IMPLEMENTATIONS, Operation, no_interpreter, operation, repair_bfloat16
from torch import Tensor

from minigpt2.ops.attention.eager import split_heads


@pytest.fixture(scope="session", autouse=True)
def bfloat16_in_the_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        if no_interpreter() is None:
            repair_bfloat16(patch)
        yield


@pytest.fixture(params=IMPLEMENTATIONS)
def op(request: pytest.FixtureRequest) -> Operation:
    """Each implementation of the operation in turn."""
    return operation(request.param)


@pytest.fixture(autouse=True)
def needs_what_it_tests(request: pytest.FixtureRequest):
    if "op" not in request.fixturenames or type(request.getfixturevalue("op")) is Operation:
        request.getfixturevalue("needs_the_kernel")


def masked_eager(qkv: Tensor, n_head: int, keep: Tensor | None = None, p: float = 0.0) -> Tensor:
    """The eager form with a given dropout mask, True where a probability is kept."""
    q, k, v = split_heads(qkv, n_head)
    T, D = q.shape[2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)
    weights = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(dim=-1)
    if keep is not None:
        weights = weights * keep / (1 - p)
    return (weights @ v).transpose(1, 2).reshape(*qkv.shape[:2], -1)


@pytest.fixture
def eager():
    return masked_eager
