import math

import pytest
import torch
from torch import Tensor

from minigpt2.attention.eager import split_heads
from minigpt2.attention.fused import unavailable


@pytest.fixture(autouse=True)
def needs_the_kernel():
    reason = unavailable("cpu", torch.float32, 64)
    if reason is not None and "no C++ compiler" in reason:
        pytest.skip(reason)
    assert reason is None  # where there is a compiler, a kernel that does not build is a failure


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
