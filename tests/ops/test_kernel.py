"""The calls into compiled code: tensors of any layout give the right number, and what would touch memory that is not
theirs is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.ops import kernel
from minigpt2.ops.attention import attention
from minigpt2.ops.attention.fused import decode, fused_attention
from minigpt2.ops.dropout import dropout_add
from minigpt2.ops.gelu import gelu
from minigpt2.ops.products import project, project_transposed

pytestmark = pytest.mark.usefixtures("needs_the_kernel")


class Subclass(torch.Tensor):
    """One that changes nothing."""


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def unaligned(*shape: int) -> Tensor:
    there = torch.frombuffer(bytearray(4 * randn(*shape).numel() + 1), dtype=torch.float32, offset=1)
    return there.view(shape).copy_(randn(*shape))


def inference(*shape: int) -> Tensor:
    with torch.inference_mode():
        return randn(*shape)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "strided": lambda *shape: randn(*shape, 2)[..., 1],
    "columns": lambda *shape: randn(*shape).mT.contiguous().mT if len(shape) > 1 else randn(*shape),
    "expanded": lambda *shape: randn(shape[0], *[1] * (len(shape) - 1)).expand(shape),
    "with an offset": lambda *shape: randn(randn(*shape).numel() + 3)[3:].view(shape),
    "negative": lambda *shape: torch.randn(shape, dtype=torch.complex64).conj().imag,
    "zero": lambda *shape: torch._efficientzerotensor(shape),
    "unaligned": unaligned,
    "subclass": lambda *shape: randn(*shape).as_subclass(Subclass),
    "parameter": lambda *shape: torch.nn.Parameter(randn(*shape)),
    "inference": inference,
    "empty": lambda *shape: randn(0, *shape[1:]),
}


def assert_close(found: Tensor, expected: Tensor) -> None:
    found, expected = (t.detach().as_subclass(Tensor).clone() for t in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_values_of_any_layout(layout: str) -> None:
    made = LAYOUTS[layout]
    x, w, b, qkv = made(3, 32), made(32, 64), made(64), made(2, 7, 96)
    if layout == "empty":
        w, b = randn(32, 64), randn(64)
    q, k, v = made(2, 3, 1, 16), made(2, 3, 9, 16), made(2, 3, 9, 16)
    assert_close(project(x, w, b), torch.addmm(b, x, w))
    assert_close(project_transposed(x, w.t()), x @ w)
    assert_close(decode(q, k, v), (q @ k.mT / 4).softmax(-1) @ v)
    assert_close(fused_attention(qkv, 2), attention(qkv, 2, backend="eager"))
    assert_close(gelu(x), F.gelu(x, approximate="tanh"))
    plain = x.as_subclass(Tensor).clone()
    torch.manual_seed(0)
    dropped = dropout_add(x, x, 0.5)
    torch.manual_seed(0)
    assert_close(dropped, dropout_add(plain, plain, 0.5))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "inference"])
def test_gradients_of_any_layout(layout: str) -> None:
    x, qkv = randn(3, 32), randn(2, 7, 96)
    if layout == "empty":
        x, qkv = x[:0], qkv[:0]
    for ours, plain, operand in (
        (gelu, lambda x: F.gelu(x, approximate="tanh"), x),
        (lambda x: fused_attention(x, 2), lambda x: attention(x, 2, backend="eager"), qkv),
        (lambda x: dropout_add(x, x, 0.0), lambda x: x + x, x),
    ):
        operand = operand.requires_grad_()
        grad = LAYOUTS[layout](*ours(operand).shape).detach()
        found, expected = (torch.autograd.grad(f(operand), operand, grad)[0] for f in (ours, plain))
        assert_close(found, expected)


def test_no_dimension_and_no_elements() -> None:
    one = torch.tensor(2.0, requires_grad=True)
    assert_close(gelu(one), F.gelu(one, approximate="tanh"))
    assert dropout_add(one, one, 0.5).item() in (2.0, 6.0)
    for shape in ((0, 3), (3, 0), (0,)):
        empty = torch.zeros(shape, requires_grad=True)
        (gelu(empty).sum() + dropout_add(empty, empty, 0.5).sum()).backward()
        assert empty.grad is not None
    for B, T in ((0, 3), (2, 0), (0, 0)):
        qkv = torch.zeros(B, T, 96, requires_grad=True)
        fused_attention(qkv, 2, dropout_p=0.1).sum().backward()
        assert qkv.grad is not None
    with torch.no_grad():
        assert project(torch.zeros(3, 0), torch.zeros(0, 64), torch.ones(64)).eq(1).all()
        assert project(torch.zeros(3, 32), torch.zeros(32, 0), torch.ones(0)).shape == (3, 0)
        assert project_transposed(torch.zeros(3, 0), torch.zeros(5, 0)).eq(0).all()
        assert decode(torch.zeros(0, 2, 1, 16), torch.zeros(0, 2, 3, 16), torch.zeros(0, 2, 3, 16)).shape[0] == 0


def meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


OPS: Any = torch.ops.minigpt2
X, QKV, OUT, LSE, SEED = randn(4, 32), randn(1, 2, 96), randn(1, 2, 32), randn(1, 2, 2), torch.tensor(1)
Q, K = randn(1, 2, 1, 16), randn(1, 2, 5, 16)
LABELS = torch.arange(len(X))


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    return kernel.cross_entropy_(logits, labels, gradient=True)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: OPS.gelu_backward(randn(4, 31), X), "the gradient must be like x"),
    (lambda: OPS.gelu_backward(X.double(), X), "the gradient must be like x"),
    (lambda: OPS.gelu_backward(meta(4, 32), X), "the gradient must be like x"),
    (lambda: OPS.gelu(X.half()), "the kernel takes float32, bfloat16 or float64 tensors on the CPU, not torch.float16"),
    (lambda: OPS.gelu(X.long()), "not torch.int64 ones on cpu"),
    (lambda: OPS.dropout_add(X, X[:2], 0.1, SEED), "residual must be like x"),
    (lambda: OPS.dropout_add(X, meta(4, 32), 0.1, SEED), "residual must be like x"),
    (lambda: OPS.dropout_add(X, None, 0.1, SEED.float()), "dropout needs a seed: one int64"),
    (lambda: OPS.dropout_add(X, None, 0.1, SEED.expand(2)), "dropout needs a seed: one int64"),
    (lambda: OPS.dropout_add(X, None, 0.1, meta().long()), "dropout needs a seed: one int64"),
    (lambda: dropout_add(X, X[:2], 0.0), "x and residual must have one shape and device"),
    (lambda: dropout_add(X, meta(4, 32), 0.1), "x and residual must have one shape and device"),
    (lambda: dropout_add(X, None, float("nan")), "the dropout probability must be in [0, 1], got nan"),
    (lambda: dropout_add(X, None, -0.5), "the dropout probability must be in [0, 1], got -0.5"),
    (lambda: OPS.attention(QKV, 2, 0.1, meta().long()), "dropout needs a seed: one int64"),
    (lambda: OPS.attention(QKV, 2, 0.1, None), "dropout needs a seed: one int64"),
    (lambda: OPS.attention(QKV, 2, float("nan"), SEED), "the dropout probability must be in [0, 1], got nan"),
    (lambda: OPS.attention(randn(1, 2, 72), 1, 0.0, None), "the head size must be a multiple of 16 up to 256, not 24"),
    (lambda: fused_attention(QKV, 2, dropout_p=1.5), "the dropout probability must be in [0, 1], got 1.5"),
    (lambda: fused_attention(QKV, 0), "qkv must be (B, T, 3C)"),
    (lambda: OPS.attention_backward(OUT, QKV, OUT, randn(1, 2, 3), 2, 0.0, None), "must belong to qkv"),
    (lambda: OPS.attention_backward(OUT[:, :1], QKV, OUT, LSE, 2, 0.0, None), "must belong to qkv"),
    (lambda: OPS.attention_backward(OUT.double(), QKV, OUT, LSE, 2, 0.0, None), "must have the dtype of qkv"),
    (lambda: OPS.attention_backward(OUT, QKV, OUT, LSE.double(), 2, 0.0, None), "must have the dtype of qkv"),
    (lambda: OPS.attention_backward(OUT, QKV, OUT, meta(1, 2, 2), 2, 0.0, None), "must be on the device of qkv"),
    (lambda: decode(Q, K[:, :, :0], K[:, :, :0]), "q must be (B, H, 1, D)"),
    (lambda: decode(Q, K, K[:, :1]), "q must be (B, H, 1, D)"),
    (lambda: decode(K, K, K), "q must be (B, H, 1, D)"),
    (lambda: decode(Q[0, 0], K[0, 0], K[0, 0]), "q must be (B, H, 1, D)"),
    (lambda: decode(Q, K.double(), K.double()), "the tensors must have one dtype"),
    (lambda: decode(Q, meta(1, 2, 5, 16), K), "q, k and v must be on one device"),
    (lambda: kernel.few_rows(X, randn(31, 64), randn(64)), "are no product of few rows"),
    (lambda: kernel.few_rows(randn(9, 32), randn(32, 64), randn(64)), "are no product of few rows"),
    (lambda: kernel.few_rows(X[0], randn(32, 64), randn(64)), "are no product of few rows"),
    (lambda: kernel.few_rows(X, randn(32, 40), randn(40)), "are no product of few rows"),
    (lambda: kernel.few_rows(X[:, :0], randn(0, 64), randn(64)), "are no product of few rows"),
    (lambda: kernel.few_rows(X, randn(64, 30), None), "are no product of few rows"),
    (lambda: kernel.few_rows(X, randn(32, 64), randn(63)), "bias must be (64,), got (63,)"),
    (lambda: kernel.few_rows(X, randn(32, 64), randn(64).double()), "the tensors must have one dtype"),
    (lambda: kernel.few_rows(X, meta(32, 64), randn(64)), "tensors on the CPU, not torch.float32 ones on meta"),
    (lambda: kernel.column_sums(X[0]), "x must be a matrix, not (32,)"),
    (lambda: kernel.column_sums(X.half()), "tensors on the CPU, not torch.float16 ones on cpu"),
    (lambda: cross_entropy_(X[0], LABELS), "logits (n, V) and labels (n,) do not fit"),
    (lambda: cross_entropy_(X, LABELS[:1]), "logits (n, V) and labels (n,) do not fit"),
    (lambda: cross_entropy_(X[:, :0], LABELS), "logits (n, V) and labels (n,) do not fit"),
    (lambda: cross_entropy_(X, LABELS.int()), "labels must be int64 on the CPU, not torch.int32 on cpu"),
    (lambda: cross_entropy_(X, LABELS - 1), "labels must be in [0, 32), not from -1 to"),
    (lambda: cross_entropy_(X, LABELS + 32), "labels must be in [0, 32), not from 32 to"),
    (lambda: cross_entropy_(X[:1].expand(len(X), -1), LABELS), "logits must have rows of their own in memory"),
    (lambda: cross_entropy_(X.t().contiguous().t(), LABELS), "logits must have rows of their own in memory"),
    (lambda: cross_entropy_(X.half(), LABELS), "tensors on the CPU, not torch.float16 ones on cpu"),
]


@pytest.mark.parametrize(("call", "why"), REFUSED, ids=[f"{i}-{why[:30]}" for i, (_, why) in enumerate(REFUSED)])
def test_what_does_not_fit_is_refused(call: Callable[[], object], why: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=re.escape(why)):
        call()


def test_layouts_without_strides_take_the_path_of_pytorch() -> None:
    x, w, b = randn(4, 32), randn(32, 64), randn(64)
    with torch.no_grad():
        assert_close(project(x.to_sparse(), w, b), torch.addmm(b, x, w))
        assert_close(project_transposed(x.to_sparse(), w.t()), x @ w)
    for call in (lambda: gelu(x.to_sparse()), lambda: fused_attention(randn(1, 2, 96).to_mkldnn(), 2)):
        with pytest.raises(NotImplementedError):
            call()


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.usefixtures("needs_the_kernel")
def test_few_rows_of_bfloat16_are_as_exact_as_the_plain_product(rows: int) -> None:
    x, w, b = (randn(*shape).bfloat16() for shape in ((rows, 96), (96, 64), (64,)))
    exact = x.double() @ w.double() + b.double()
    with torch.no_grad():
        for ours, plain, truth in (
            (kernel.few_rows(x, w, b), torch.addmm(b, x, w), exact),
            (kernel.few_rows(x, w.t().contiguous(), None), x @ w, exact - b.double()),
        ):
            assert ours.dtype == torch.bfloat16
            assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max()


def exact_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias of what bfloat16 holds of a and b."""
    product = a.bfloat16().double() @ b.bfloat16().double()
    return product if bias is None else product + bias.double()


# One, less than a tile, tiles and an edge, more than a strip, and each dimension larger than the others by far.
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 1, 1), (5, 7, 3), (17, 49, 33), (64, 96, 64), (300, 100, 70), (40, 50, 6500), (30, 5000, 40), (3000, 8, 96)],
)
@pytest.mark.parametrize("a_turned", [False, True])
@pytest.mark.parametrize("b_turned", [False, True])
@pytest.mark.usefixtures("needs_tiles")
def test_matmul(M: int, N: int, K: int, a_turned: bool, b_turned: bool) -> None:
    """Every layout and dtype, with a bias, added, and into rows that lie apart: to the rounding of float32's sums."""
    a = (randn(K, M).t() if a_turned else randn(M, K)).bfloat16()
    bias, around = randn(N), randn(M, N + 3)
    for dtype in (torch.float32, torch.bfloat16):
        b = (randn(N, K).t() if b_turned else randn(K, N)).to(dtype)
        for added in (None, bias):
            exact = exact_product(a, b, added)
            tolerance = 1e-5 * K**0.5
            assert (kernel.matmul(a, b, added, dtype=torch.float32) - exact).abs().max() <= tolerance
            found = kernel.matmul(a, b, added)
            assert found.dtype == torch.bfloat16
            assert ((found - exact).abs() <= exact.abs() * 2**-8 + tolerance).all()  # rounded once
            for add in (False, True):
                room = around.clone()
                kernel.matmul(a, b, added, out=room[:, :N], add=add)
                assert (room[:, :N] - (exact + around[:, :N] * add)).abs().max() <= tolerance
                assert torch.equal(room[:, N:], around[:, N:])


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (17, 49, 33), (300, 100, 70), (30, 900, 40)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.usefixtures("needs_tiles")
def test_matmul_with_an_addend(M: int, N: int, K: int, turned: bool) -> None:
    a, b, bias = randn(M, K).bfloat16(), randn(K, N), randn(N)
    addend = (randn(N, M).t() if turned else randn(M, N)).bfloat16()
    for alpha, beta, added in ((1.0, 1.0, None), (-2.5, 0.3, bias), (0.7, 0.0, None)):
        exact = alpha * exact_product(a, b) + beta * addend.double() + (0 if added is None else added)
        found = kernel.matmul(a, b, added, addend=addend, alpha=alpha, beta=beta)
        assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-5 * K**0.5).all()  # rounded once
        without = exact - beta * addend.double()
        found = kernel.matmul(a, b, added, alpha=alpha)
        assert ((found - without).abs() <= without.abs() * 2**-8 + 1e-5 * K**0.5).all()


@pytest.mark.usefixtures("needs_tiles")
def test_neither_threads_nor_layouts_nor_other_rows_and_columns_change_a_bit_of_matmul(
    threads: Callable[[int], None],
) -> None:
    a, b = randn(200, 4000).bfloat16(), randn(4000, 150)
    found = []
    for n in (1, 2, 5):
        threads(n)
        found += [kernel.matmul(a, b, dtype=torch.float32), kernel.matmul(a, b.bfloat16(), dtype=torch.float32)]
        found.append(kernel.matmul(a.t().contiguous().t(), b.t().contiguous().t(), dtype=torch.float32))
        found.append(torch.cat([kernel.matmul(a[:9], b, dtype=torch.float32), found[-1][9:]]))
        found.append(torch.cat([kernel.matmul(a, b[:, :50], dtype=torch.float32), found[-1][:, 50:]], 1))
        found.append(kernel.matmul(b.t().bfloat16(), a.t(), dtype=torch.float32).t())
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.usefixtures("needs_tiles")
def test_what_is_not_finite_stays_in_its_row_or_column_of_matmul() -> None:
    a, b = randn(70, 100).bfloat16(), randn(100, 90)
    a[3, 99], b[99, 89] = float("nan"), float("inf")
    found = kernel.matmul(a, b)
    assert torch.equal(found.isfinite(), exact_product(a, b).isfinite())
    assert not found[3].isfinite().any()
    assert not found[:, 89].isfinite().any()
    assert found[4:, :89].isfinite().all()


@pytest.mark.usefixtures("needs_tiles")
def test_matmul_of_nothing_and_what_it_refuses() -> None:
    a, b = randn(4, 32).bfloat16(), randn(32, 8)
    assert kernel.matmul(a[:0], b).shape == (0, 8)
    assert kernel.matmul(a, b[:, :0]).shape == (4, 0)
    bias = randn(8)
    assert torch.equal(kernel.matmul(a[:, :0], b[:0], bias, dtype=torch.float32), bias.expand(4, 8))
    assert torch.equal(kernel.matmul(a, b, torch._neg_view(bias)), kernel.matmul(a, b, -bias))
    for why, arguments, options in (
        ("do not fit together: (4, 32), (31, 8)", (a, b[:31]), {}),
        ("do not fit together: (32,), (32, 8)", (a[0], b), {}),
        ("do not fit together: (4, 32), (32, 8), (7,)", (a, b, bias[:7]), {}),
        ("not torch.float32, torch.float32, torch.bfloat16", (a.float(), b), {}),
        ("not torch.bfloat16, torch.float64, torch.bfloat16", (a, b.double()), {}),
        ("not torch.bfloat16, torch.float32, torch.float16", (a, b), {"dtype": torch.float16}),
        ("strided tensors on the CPU", (a, b.to("meta")), {}),
        ("only to a float32 `out`", (a, b), {"add": True}),
        ("only to a float32 `out`", (a, b), {"add": True, "out": bias.expand(4, 8).bfloat16()}),
        ("out must be (4, 8), its rows contiguous, not (8, 4)", (a, b), {"out": randn(8, 4)}),
        ("out must be (4, 8), its rows contiguous, not (4, 8)", (a, b), {"out": randn(8, 4).t()}),
        ("rows of their own in memory, not strides (0, 1)", (a, b), {"out": bias.expand(4, 8)}),
        ("out must be (4, 8), its rows contiguous", (a, b), {"out": torch._efficientzerotensor((4, 8))}),
        ("for a product in bfloat16, not in torch.float32", (a, b), {"dtype": torch.float32, "alpha": 2.0}),
        ("for a product in bfloat16, not in torch.float32", (a, b), {"out": randn(4, 8), "addend": randn(4, 8)}),
        ("must be bfloat16 (4, 8), not torch.float32 (4, 8)", (a, b), {"addend": randn(4, 8)}),
        ("must be bfloat16 (4, 8), not torch.bfloat16 (8,)", (a, b), {"addend": bias.bfloat16()}),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(why)):
            kernel.matmul(*arguments, **options)


# No rows, fewer than are read side by side, one band and a part; no columns, less than a vector, vectors and a rest.
@pytest.mark.parametrize("rows", [0, 1, 3, 129, 300])
@pytest.mark.parametrize("columns", [0, 1, 7, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("needs_the_kernel")
def test_column_sums(threads: Callable[[int], None], dtype: torch.dtype, rows: int, columns: int) -> None:
    x = randn(rows, columns + 3).to(dtype)[:, :columns]
    found = []
    for n in (1, 2, 5):
        threads(n)
        found.append(kernel.column_sums(x))
    exact = x.double().sum(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(f.dtype == wide and torch.equal(f, found[0]) for f in found)
    torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=2e-6 * max(1, rows) ** 0.5)
    assert torch.equal(kernel.column_sums(x.t()), kernel.column_sums(x.t().contiguous()))


@pytest.mark.usefixtures("needs_the_kernel")
def test_column_sums_keep_what_is_not_finite_to_its_column() -> None:
    x = randn(200, 40)
    x[150, 33], x[3, 5] = float("nan"), float("inf")
    assert torch.equal(kernel.column_sums(x).isfinite(), x.sum(0).isfinite())


def test_without_amx_matmul_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "tiles", lambda: False)
    with pytest.raises(RuntimeError, match="this processor has no AMX"):
        kernel.matmul(randn(4, 4).bfloat16(), randn(4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 32, 64, 129, 1000])
@pytest.mark.usefixtures("needs_the_kernel")
def test_cross_entropy_and_its_gradient_in_place(dtype: torch.dtype, width: int) -> None:
    padded = (20 * randn(5, width + 3)).to(dtype)
    labels, before = torch.arange(5) * 3 % width, padded.clone()
    logits = padded[:, :width].double().requires_grad_()
    exact = F.cross_entropy(logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), logits)
    losses = kernel.cross_entropy_(padded[:, :width], labels, gradient=False)
    assert padded.equal(before)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=1e-5)
    assert kernel.cross_entropy_(padded[:, :width], labels, gradient=True).equal(losses)
    error = (padded[:, :width].double() - gradient).abs().max()
    assert error <= {torch.float32: 3e-7, torch.bfloat16: 2**-9, torch.float64: 1e-15}[dtype]
    assert padded[:, width:].equal(before[:, width:])


@pytest.mark.usefixtures("needs_the_kernel")
def test_cross_entropy_of_infinite_logits_is_that_of_pytorch() -> None:
    logits = randn(6, 40)
    logits[1, 3], logits[2, 5], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, :], logits[4, 7], logits[5, ::2] = -torch.inf, 1.0, -torch.inf
    labels = torch.tensor([0, 0, 5, 1, 7, 1])
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(kernel.cross_entropy_(logits, labels, gradient=True), expected, equal_nan=True)
    assert logits[1].isnan().all()


def test_a_weight_of_another_dtype_is_an_error() -> None:
    x, w, b = randn(4, 32), randn(32, 64), randn(64)
    with torch.no_grad():
        for dtype in (torch.float16, torch.int32):
            with pytest.raises(RuntimeError, match="same dtype"):
                project(x, w.to(dtype), b)
        with pytest.raises(RuntimeError, match="dtype"):
            project(x, w, b.double())
