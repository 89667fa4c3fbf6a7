"""The dropout mask: that the kernel applies the one it documents, and that it is Bernoulli(1 - p)."""

import math

import pytest
import torch
from implementations import for_each

from minigpt2.ops.attention import attention
from minigpt2.ops.attention.fused import dropout_mask

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 0x0123_4567_89AB_CDEF, 2**63 - 2]


def dtype_of(op):
    """One that serves a head size of 240."""
    return torch.float32 if op.device == "cpu" and op.tile == 1 else torch.bfloat16


MASKS = [*((seed, 0.1) for seed in SEEDS), (SEEDS[-2], 0.5), (SEEDS[-1], 0.9)]


@pytest.mark.parametrize(("op", "seed", "p"), for_each(MASKS, MASKS[-3:]), indirect=["op"])
def test_the_kernel_applies_the_documented_mask(op, seed, p):
    """With q = k = 0 and v the identity, the output is the matrix of probabilities itself."""
    B, H, T = 2, 2, 240
    qkv = torch.zeros(B, T, 3, H, T, dtype=dtype_of(op))
    qkv[:, :, 2] = torch.eye(T)[:, None]
    out, _ = op(qkv.view(B, T, -1), H, p, seed)
    kept = out.view(B, T, H, T).transpose(1, 2) != 0
    assert torch.equal(kept, dropout_mask(seed, B, H, T, p).tril())


@pytest.mark.parametrize(("op", "seed", "p"), for_each(MASKS[-3:-1], MASKS[-2:-1]), indirect=["op"])
def test_the_backward_pass_applies_the_same_mask_to_all_three_gradients(op, seed, p):
    """With q, k and the gradient the identity and v = 1, each of dq, dk and dv is a matrix with an entry for each pair:
    dv is the dropped probabilities, and dq and dk are above 0 for what is kept, below for what is dropped."""
    B, H, T = 1, 2, 240
    identity = torch.eye(T, dtype=dtype_of(op))
    qkv = torch.stack([identity, identity, torch.ones_like(identity)], 1)  # (T, 3, T)
    qkv = qkv[:, :, None].expand(T, 3, H, T).reshape(B, T, 3 * H * T).requires_grad_()
    out, _ = op(qkv, H, p, seed)
    out.backward(identity[:, None].expand(T, H, T).reshape(B, T, H * T))
    dq, dk, dv = qkv.grad.view(B, T, 3, H, T).permute(2, 0, 3, 1, 4)
    kept = dropout_mask(seed, B, H, T, p).tril()
    some_dropped = (kept.sum(-1, keepdim=True) < torch.arange(1, T + 1).view(T, 1)).expand_as(kept)  # or all are 0
    assert some_dropped[..., 20:, :].double().mean() > 0.9
    assert torch.equal(dv != 0, kept.mT)
    assert torch.equal((dq > 0)[some_dropped], kept[some_dropped])
    assert torch.equal((dk.mT > 0)[some_dropped], kept[some_dropped])


def assert_four_sigma(kept, p, count):
    sigma = math.sqrt(p * (1 - p) / count)
    assert ((kept - (1 - p)).abs() <= 4 * sigma).all(), f"worst {((kept - (1 - p)) / sigma).abs().max():.2f} sigma"


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_keep_rate(p):
    B, H, T = 2, 3, 512
    mask = dropout_mask(1234567, B, H, T, p).double()
    assert_four_sigma(mask.mean(), p, mask.numel())
    assert_four_sigma(mask.mean((2, 3)), p, T * T)
    assert_four_sigma(mask[0, 0].mean(1), p, T)
    assert_four_sigma(mask[0, 0].mean(0), p, T)
    assert_four_sigma(mask[1, 2].tril().sum() / (T * (T + 1) / 2), p, T * (T + 1) / 2)


def correlation(a, b, p):
    """In units of its standard deviation for independent masks."""
    a, b = a.double() - (1 - p), b.double() - (1 - p)
    return abs((a * b).mean().item()) / (p * (1 - p)) * math.sqrt(a.numel())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_uncorrelated(p):
    seed = 987654321
    mask = dropout_mask(seed, 2, 2, 512, p)
    for lag in (1, 2, 15, 16, 17, 32, 64):
        assert correlation(mask[..., lag:], mask[..., :-lag], p) < 4
        assert correlation(mask[..., lag:, :], mask[..., :-lag, :], p) < 4
    assert correlation(mask[:, 0], mask[:, 1], p) < 4
    assert correlation(mask[0], mask[1], p) < 4
    for other in (seed + 1, seed + 2, seed + 2**32, seed ^ 2**62):
        assert correlation(mask, dropout_mask(other, 2, 2, 512, p), p) < 4


@pytest.mark.slow
def test_no_two_rows_share_a_stretch():
    """With keys of 32 bits about 28 pairs of these 16,384 rows would run through the same words, one behind the other.

    Every stretch of 62 words in a row, one bit of each, is compared with every other: by chance alone, 1 in 80,000 runs
    would find two alike.
    """
    T = 1024
    bits = dropout_mask(5, 4, 4, T, 0.5).view(-1, T // 32, 2, 16)[:, :, 0].reshape(-1, T // 2)  # the words' low halves
    stretch = torch.zeros(bits.shape[0], bits.shape[1] - 61, dtype=torch.int64)
    for i in range(62):
        stretch = stretch * 2 + bits[:, i : i + stretch.shape[1]]
    assert (stretch.flatten().sort().values.diff() != 0).all()


def test_the_mask_does_not_depend_on_the_length():
    assert torch.equal(dropout_mask(7, 2, 3, 200, 0.1)[:, :, :77, :77], dropout_mask(7, 2, 3, 77, 0.1))
    # nor do the rows of the output on what follows them
    qkv = torch.randn(1, 500, 192, generator=torch.Generator().manual_seed(0))
    whole, start = (torch.ops.minigpt2.attention(x, 1, 0.1, torch.tensor(7))[0] for x in (qkv, qkv[:, :333]))
    assert torch.equal(whole[:, :333], start)


def test_torch_manual_seed_governs():
    qkv = torch.randn(1, 64, 192, generator=torch.Generator().manual_seed(0))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append([attention(qkv, 1, dropout_p=0.1, backend="fused") for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_everything_and_nothing_dropped():
    qkv = torch.randn(1, 70, 192, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = attention(qkv, 1, dropout_p=1.0, backend="fused")
    out.sum().backward()
    assert not out.any()
    assert not qkv.grad.any()
    state = torch.get_rng_state()
    attention(qkv, 1, dropout_p=0.0, backend="fused")
    assert torch.equal(state, torch.get_rng_state())
