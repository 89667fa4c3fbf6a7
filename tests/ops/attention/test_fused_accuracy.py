"""The kernels against the eager form in float64, and themselves where results must not depend on how they ran."""

import itertools
import math

import pytest
import torch
from implementations import DTYPES, SEED, for_each, operation

from minigpt2.ops.attention import attention
from minigpt2.ops.attention.eager import split_heads
from minigpt2.ops.attention.fused import dropout_mask

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 1024]
SHAPES = [(2 if T < 1000 else 1, T, 3 if T < 1000 else 2, 64) for T in LENGTHS]
SHAPES += [(1, 70, 2, D) for D in (16, 32, 48, 80, 96, 112, 128, 160, 224, 256)]
SHAPES += [(1, 400, 1, 128), (1, 200, 1, 256), (5, 3, 1, 64)]

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Of what a NaN does not reach, which another path may have made."""


def grid():
    """(implementation, B, T, H, D, dtype, p). In the interpreter fewer; `-m slow` adds some, the long ones with one
    head, and `-m grid` the rest."""
    cases, cuda, slow, rest = [], [pytest.mark.cuda], [pytest.mark.slow], [pytest.mark.grid]
    for name, dtypes in DTYPES.items():
        for (B, T, H, D), dtype, p in itertools.product(SHAPES, dtypes, (0.0, 0.1)):
            if name != "cpu" and (D in (96, 160, 224) or (dtype == torch.float32 and D > 128)):
                continue
            if name != "interpreter":
                cases.append(pytest.param(name, B, T, H, D, dtype, p, marks=cuda if name == "cuda" else []))
                continue
            left_out = [(torch.bfloat16, 0.0), (torch.float16, 0.1)]
            fewer = H if (dtype, p) in left_out else 0  # how many heads are left to `-m grid`
            if T >= 200:
                fewer = H - 1 if (dtype, p) == (torch.bfloat16, 0.1) else H
            if fewer:
                cases.append(pytest.param(name, B, T, H, D, dtype, p, marks=rest))
            if fewer < H:
                quick = (T in (17, 64, 70) and p > 0) or T == 65
                cases.append(pytest.param(name, B, T, H - fewer, D, dtype, p, marks=[] if quick else slow))
    return cases


def forward_and_gradients(function, qkv, grad):
    qkv = qkv.detach().clone().requires_grad_()
    out = function(qkv)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *qkv.grad.chunk(3, dim=-1)]


def relative_error(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item() if reference.norm() else x.double().norm().item()


@pytest.mark.parametrize(("op", "B", "T", "H", "D", "dtype", "p"), grid(), indirect=["op"])
def test_error_is_at_most_twice_that_of_eager(op, B, T, H, D, dtype, p, eager):
    torch.manual_seed(T * 1000 + D)
    qkv, grad = torch.randn(B, T, 3 * H * D).to(dtype), torch.randn(B, T, H * D).to(dtype)
    keep = dropout_mask(SEED, B, H, T, p) if p else None
    exact = forward_and_gradients(lambda x: eager(x, H, keep, p), qkv.double(), grad)
    plain = forward_and_gradients(lambda x: eager(x, H, keep, p).to(dtype), qkv, grad)
    fused = forward_and_gradients(lambda x: op(x, H, p)[0], qkv, grad)
    # The eager form in float64 is its own reference, and a row of one key is exact: a few roundings are allowed.
    floor = 8 * torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(dtype).eps
    # At T = 1, and for the first row always, dq and dk are 0 in exact arithmetic: what is left is rounding.
    size = max(x.norm().item() for x in exact)
    for name, e, a, b in zip(("out", "dq", "dk", "dv"), exact, plain, fused, strict=True):
        assert b.dtype == dtype
        if e.norm() < 1e-6 * size:
            assert (b.double() - e).norm() <= 2 * (a.double() - e).norm() + floor * size, name
        else:
            assert relative_error(b, e) <= 2 * relative_error(a, e) + floor, name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("T", [1, 2, 5, 20])
def test_the_gradients_of_a_few_keys_with_large_scores(op, T, seed, eager):
    """Where dP and delta nearly cancel, delta must belong to the probabilities as they were rounded: from a log-sum-exp
    in the hundreds. That rounding is in dv too, where nothing cancels it."""
    torch.manual_seed(100 * seed + T)
    qkv, grad = torch.randn(2, T, 3 * 64), torch.randn(2, T, 64)
    qkv[..., :128] *= 5
    exact = forward_and_gradients(lambda x: eager(x, 1), qkv.double(), grad)
    plain = forward_and_gradients(lambda x: eager(x, 1), qkv, grad)
    fused = forward_and_gradients(lambda x: op(x, 1)[0], qkv, grad)
    size = max(x.norm().item() for x in exact)
    for e, a, b in list(zip(exact, plain, fused, strict=True))[1:3]:
        assert (b.double() - e).norm() <= 2 * (a.double() - e).norm() + 2 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("T", [1, 65, 300])
def test_log_sum_exp(op, T):
    torch.manual_seed(T)
    qkv = torch.randn(2, T, 3 * 128)
    lse = op(qkv, 2)[1]
    q, k, _ = split_heads(qkv.double(), 2)
    scores = (q @ k.transpose(-2, -1) / 8).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 2, T)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-6, rtol=1e-6)


def extreme_inputs():
    torch.manual_seed(0)
    random = torch.randn(1, 130, 3 * 128)
    huge_key = random.clone()
    huge_key[:, 70, 128:256] *= 1e6
    return {
        "all equal": torch.full_like(random, 3.0),
        "all zero": torch.zeros_like(random),
        "plus and minus 1e4": random.sign() * 1e4,
        "random times 1e4": random * 1e4,
        "one huge key": huge_key,
        "subnormal": random * 1e-40,
        "tiny": random * 1e-20,
    }


EXTREME_CASES = list(itertools.product(extreme_inputs(), [0.0, 0.1], [torch.float32, torch.bfloat16]))


@pytest.mark.parametrize(
    ("op", "name", "p", "dtype"), for_each(EXTREME_CASES, EXTREME_CASES[::4]), indirect=["op"], ids=str
)
def test_extreme_inputs_stay_finite_where_eager_does(op, name, p, dtype, eager):
    qkv = extreme_inputs()[name].to(dtype)
    grad = torch.randn(1, 130, 128, generator=torch.Generator().manual_seed(1))
    keep = dropout_mask(SEED, 1, 2, 130, p) if p else None
    exact = forward_and_gradients(lambda x: eager(x, 2, keep, p), qkv.double(), grad)
    fused = forward_and_gradients(lambda x: op(x, 2, p)[0], qkv, grad)
    for e, b in zip(exact, fused, strict=True):
        assert (b.isfinite() | ~e.isfinite()).all()


NAN_CASES = list(
    itertools.product([0, 5, 40, 64, 129], [math.nan, math.inf], [0.0, 0.1], [torch.float32, torch.bfloat16])
)


@pytest.mark.parametrize(
    ("op", "row", "value", "p", "dtype"), for_each(NAN_CASES, NAN_CASES[6::10]), indirect=["op"], ids=str
)
def test_nan_reaches_only_the_rows_that_see_it(op, row, value, p, dtype):
    """Or, in the Triton kernels, no row before those of its own tile; and no other head. The others are as without."""
    torch.manual_seed(0)
    T, D = 130, 64
    before = row // op.tile * op.tile
    for part, rows in (("q", [row]), ("k", range(row, T)), ("v", range(row, T))):
        qkv = torch.randn(2, T, 3 * 2 * D).to(dtype)
        q, k, v = split_heads(qkv, 2)  # views
        {"q": q, "k": k, "v": v}[part][0, 1, row, 7] = value
        out = op(qkv, 2, p)[0].view(2, T, 2, D)
        {"q": q, "k": k, "v": v}[part][0, 1, row, 7] = 0.5
        clean = op(qkv, 2, p)[0].view(2, T, 2, D)
        expected = torch.zeros(2, T, 2, D, dtype=torch.bool)
        expected[0, list(rows), 1] = True
        may = expected.clone()
        if part != "q":
            may[0, before:, 1] = True
        assert out[~may].isfinite().all()
        if not p:
            torch.testing.assert_close(out[~may], clean[~may], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        if part == "v":
            expected[..., :7] = expected[..., 8:] = False
            assert out[..., :7].isfinite().all()
            assert out[..., 8:].isfinite().all()
            if p:  # a dropped NaN is gone, as in eager's rows: there it is 0 * NaN, here it is not seen
                assert not out[expected].isfinite().all()
                continue
        if math.isnan(value):
            assert out[expected].isnan().all()
        elif part == "v":
            assert not out[expected].isfinite().any()


NAN_GRADIENT_CASES = list(itertools.product([0, 5, 64, 129], [torch.float32, torch.bfloat16]))


@pytest.mark.parametrize(
    ("op", "row", "dtype"), for_each(NAN_GRADIENT_CASES, NAN_GRADIENT_CASES[::2]), indirect=["op"], ids=str
)
def test_nan_in_the_gradient_reaches_only_what_depends_on_it(op, row, dtype):
    """Or, in the Triton kernels, no key after those of its own tile. The others are as without."""
    torch.manual_seed(0)
    T, D = 130, 64
    qkv, grad = torch.randn(1, T, 3 * D).to(dtype), torch.randn(1, T, D).to(dtype)
    grad[0, row, 3] = math.nan
    _, dq, dk, dv = forward_and_gradients(lambda x: op(x, 1)[0], qkv, grad)
    grad[0, row, 3] = 0.5
    _, *clean = forward_and_gradients(lambda x: op(x, 1)[0], qkv, grad)
    rows = torch.arange(T)
    after = rows > row if op.tile == 1 else rows >= (row // op.tile + 1) * op.tile
    assert dq[0, row].isnan().all()
    assert dq[0, rows != row].isfinite().all()
    assert dk[0, rows <= row].isnan().all()
    assert dk[0, after].isfinite().all()
    assert dv[0, rows <= row, 3].isnan().all()
    assert dv[0, after].isfinite().all()
    for found, other, finite in zip((dq, dk, dv), clean, (rows != row, after, after), strict=True):
        torch.testing.assert_close(found[0, finite], other[0, finite], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(dv[..., :3], clean[2][..., :3], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [0, 40, 100])
def test_a_gradient_that_overflows_reaches_only_the_keys_that_its_row_sees(row, dtype):
    torch.manual_seed(0)
    T, D = 130, 64
    qkv, grad = torch.randn(1, T, 3 * D).to(dtype), torch.randn(1, T, D).to(dtype)
    qkv[0, : row + 1, 2 * D :] = grad[0, row] = 1e25  # so dP of this row is infinite, of the others large
    _, dq, dk, dv = forward_and_gradients(lambda x: operation("cpu")(x, 1)[0], qkv, grad)
    rows = torch.arange(T)
    assert not dk[0, rows <= row].isfinite().any()
    assert dk[0, rows > row].isfinite().all()
    assert dq[0, rows != row].isfinite().all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [97, 100, 102])
def test_no_row_beyond_the_last_is_seen(T, dtype):
    """An infinite key to which every row gives the probability 0."""
    torch.manual_seed(0)
    qkv = torch.randn(1, T, 3 * 64).to(dtype)
    qkv[0, :, 0], qkv[0, T - 1, 64] = -1, math.inf
    out, _, dk, dv = forward_and_gradients(lambda x: operation("cpu")(x, 1)[0], qkv, torch.ones(1, T, 64))
    assert out.isfinite().all()
    assert dv.isfinite().all()
    assert dk.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "T", "H", "D"), [(1, 1000, 1, 64), (2, 300, 3, 64), (1, 431, 1, 128), (1, 50, 2, 16)])
def test_threads_do_not_change_a_bit(B, T, H, D, dtype, threads):
    """In C++, where one head over three threads takes a backward pass of two passes, three heads and one thread not."""
    torch.manual_seed(0)
    cpu = operation("cpu")
    qkv, grad = torch.randn(B, T, 3 * H * D).to(dtype), torch.randn(B, T, H * D).to(dtype)
    results = []
    for n in (1, 2, 3, 8):
        threads(n)
        results.append(forward_and_gradients(lambda x: cpu(x, H, 0.1)[0], qkv, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_inputs_and_gradients(op):
    torch.manual_seed(0)
    plain, grad = torch.randn(3, 40, 3 * 64).to(op.device), torch.randn(3, 40, 64).to(op.device)
    expected = forward_and_gradients(lambda x: op(x, 1)[0], plain, grad)

    def run(qkv, grad):
        qkv = qkv.detach().requires_grad_()
        out = op(qkv, 1)[0]
        return [out.detach(), *torch.autograd.grad(out, qkv, grad)[0].chunk(3, dim=-1)]

    wide = torch.zeros(6, 40, 200, device=op.device)[::2]
    wide[..., 3:195] = plain
    inputs = {
        "rows apart": wide[..., 3:195],
        "time first": plain.transpose(0, 1).contiguous().transpose(0, 1),
        "last dimension strided": plain.transpose(1, 2).contiguous().transpose(1, 2),
    }
    for name, qkv in inputs.items():
        assert not qkv.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(run(qkv, grad), expected, strict=True)), name
    strided_grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(run(plain, strided_grad), expected, strict=True))
    ones = forward_and_gradients(lambda x: op(x, 1)[0], plain, torch.ones_like(grad))
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(plain, torch.ones_like(grad[0, 0, 0]).expand(3, 40, 64)), ones, strict=True)
    )


def test_bad_sizes_and_dropout_are_refused():
    for qkv, n_head in ((torch.zeros(2, 3, 100), 2), (torch.zeros(3, 192), 1), (torch.zeros(1, 1, 192), 0)):
        with pytest.raises(ValueError, match="qkv must be"):
            torch.ops.minigpt2.attention(qkv, n_head, 0.0, None)
    with pytest.raises(ValueError, match="dropout_p must be in"):
        attention(torch.zeros(1, 4, 192), 1, dropout_p=1.5, backend="fused")
    with pytest.raises(ValueError, match="seed"):
        torch.ops.minigpt2.attention(torch.zeros(1, 4, 192), 1, 0.1, None)
