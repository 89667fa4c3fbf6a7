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
    (lambda: kernel.transposed(X), "x must be a bfloat16 matrix, not torch.float32 (4, 32)"),
    (lambda: kernel.transposed(X[0].bfloat16()), "x must be a bfloat16 matrix, not torch.bfloat16 (32,)"),
    (lambda: kernel.transposed(meta(4, 32).bfloat16()), "tensors on the CPU, not torch.bfloat16 ones on meta"),
    (
        lambda: kernel.add_transposed_(X, X.bfloat16()),
        "to must be float32 (32, 4) on the CPU, not torch.float32 (4, 32)",
    ),
    (
        lambda: kernel.add_transposed_(X.t(), X.bfloat16()),
        "to must have rows of their own in memory, not strides (1, 32)",
    ),
    (lambda: kernel.add_transposed_(X.t().double(), X.bfloat16()), "to must be float32 (32, 4) on the CPU"),
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


# One, less than a square of any processor's, squares alone, and squares with an edge on each side.
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 100])
@pytest.mark.parametrize("columns", [0, 1, 9, 96, 131])
def test_transposes(rows: int, columns: int) -> None:
    x = randn(rows, columns + 3).bfloat16()[:, :columns]
    found = kernel.transposed(x)
    assert torch.equal(found, x.t())
    if found.numel():
        up_to_32 = found.as_strided((columns, -(-rows // 32) * 32), found.stride())
        assert not up_to_32[:, rows:].any()
    around = randn(columns + 1, rows + 2)
    expected = around.clone()
    expected[:columns, :rows] += x.t()
    kernel.add_transposed_(around[:columns, :rows], x)
    assert torch.equal(around, expected)
    expected[:columns, :rows] = x.t()
    around[:columns, :rows] = float("nan")
    kernel.add_transposed_(around[:columns, :rows], x, first=True)
    assert torch.equal(around, expected)


def test_transposes_keep_what_is_not_finite() -> None:
    x = randn(40, 40).bfloat16()
    x[3, 5], x[20, 7], x[39, 39] = float("nan"), float("inf"), -float("inf")
    assert torch.equal(kernel.transposed(x).nan_to_num(9.0), x.t().nan_to_num(9.0))
    assert torch.equal(kernel.add_transposed_(torch.zeros(40, 40), x).isfinite(), x.t().isfinite())


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
