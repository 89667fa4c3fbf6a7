"""The products that PyTorch's own would make slower: those of few rows, and those that oneDNN makes. Their error, their
gradients, who is served, and that nothing but the sizes decides a sum."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from operations import CountOperations
from torch import Tensor, nn

from minigpt2 import GPT2, GPT2Config
from minigpt2.loss import linear_cross_entropy
from minigpt2.ops import kernel, products
from minigpt2.ops.products import (
    TiledProducts,
    add_transposed_product,
    multiply,
    project,
    project_transposed,
    weight_gradient,
)
from minigpt2.training.optimizer import make_optimizer

pytestmark = pytest.mark.usefixtures("needs_the_kernel")


@pytest.fixture
def served(monkeypatch):
    """The shapes of the products that the kernel made."""
    shapes, few_rows = [], kernel.few_rows_as_they_are
    monkeypatch.setattr(
        kernel, "few_rows_as_they_are", lambda *args: shapes.append(tuple(args[0].shape)) or few_rows(*args)
    )
    return shapes


def operands(M, K, N, transposed=False):
    generator = torch.Generator().manual_seed(M * K + N)
    x = torch.randn(M, K, generator=generator)
    weight = torch.randn(*((N, K) if transposed else (K, N)), generator=generator)
    return x, weight, torch.randn(N, generator=generator)


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


# One row of weights, fewer than a chunk's, a width that no chunk divides, and the widths of GPT-2.
@pytest.mark.parametrize(("K", "N"), [(1, 32), (7, 64), (8, 32), (65, 96), (130, 2016), (768, 2304), (3072, 768)])
@pytest.mark.parametrize("M", range(1, kernel.FEW + 1))
@torch.no_grad()
def test_project(served, M, K, N):
    x, weight, bias = operands(M, K, N)
    out = project(x, weight, bias)
    exact = bias.double() + x.double() @ weight.double()
    assert error(out, exact) <= 2 * error(torch.addmm(bias, x, weight), exact) + 2e-7
    assert served == [(M, K)]


# One row, fewer rows than are worked on together, one task and a part, and the head of GPT-2, nearly.
@pytest.mark.parametrize(("K", "N"), [(16, 1), (16, 3), (48, 129), (80, 128), (768, 5003)])
@pytest.mark.parametrize("M", range(1, kernel.FEW + 1))
@torch.no_grad()
def test_project_transposed(served, M, K, N):
    x, weight, _ = operands(M, K, N, transposed=True)
    out = project_transposed(x, weight)
    exact = x.double() @ weight.double().t()
    assert error(out, exact) <= 2 * error(torch.mm(x, weight.t()), exact) + 2e-7
    assert served == [(M, K)]


@torch.no_grad()
def test_threads_and_the_other_rows_change_no_bit(threads):
    x, weight, bias = operands(kernel.FEW, 200, 288)
    _, transposed, _ = operands(kernel.FEW, 208, 1000, transposed=True)
    y = torch.randn(kernel.FEW, 208, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 3, 9):  # of more than four threads some share a chunk of the weights
        threads(n)
        results = project(x, weight, bias), project_transposed(y, transposed)
        if n == 1:
            expected = results
        for found, before in zip(results, expected, strict=True):
            assert torch.equal(found, before)
    for M in range(1, kernel.FEW):
        assert torch.equal(project(x[:M], weight, bias), expected[0][:M])
        assert torch.equal(project_transposed(y[:M], transposed), expected[1][:M])


@torch.no_grad()
def test_a_nan_stays_in_its_row_and_its_column():
    x, weight, bias = operands(5, 80, 64)
    x[3, 7] = float("nan")
    for out in (project(x, weight, bias), project_transposed(x, weight.t().contiguous())):
        assert out[3].isnan().all()
        assert out[[0, 1, 2, 4]].isfinite().all()
    x, weight, bias = operands(5, 80, 64)
    weight[2, 9] = float("inf")
    for out in (project(x, weight, bias), project_transposed(x, weight.t().contiguous())):
        assert not out[:, 9].isfinite().any()
        assert out[:, torch.arange(64) != 9].isfinite().all()


@torch.no_grad()
def test_rows_that_lie_apart(served):
    x, weight, bias = operands(6, 96, 64)
    assert torch.equal(project(x[::2], weight, bias), project(x[::2].contiguous(), weight, bias))
    transposed = weight.t().contiguous()
    assert torch.equal(project_transposed(x[1::3], transposed), project_transposed(x[1::3].contiguous(), transposed))
    assert len(served) == 4


def test_what_the_kernel_does_not_serve_is_served_all_the_same(served):
    x, weight, bias = operands(4, 32, 64)
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    project(x, weight, bias).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        expected = torch.addmm(bias, x, weight)
        many = x.repeat(3, 1)
        torch.testing.assert_close(project(many, weight, bias), expected.repeat(3, 1))
        assert project(x[:0], weight, bias).shape == (0, 64)
        torch.testing.assert_close(project(x.t().contiguous().t(), weight, bias), expected)
        torch.testing.assert_close(project(x, weight.t().contiguous().t(), bias), expected)
        torch.testing.assert_close(project(x, weight[:, :40], bias[:40]), expected[:, :40])
        torch.testing.assert_close(project_transposed(x[:, :9], weight.t()[:, :9]), x[:, :9] @ weight[:9])
        for dtype in (torch.float64, torch.float16):
            assert project(x.to(dtype), weight.to(dtype), bias.to(dtype)).dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert project(x, weight, bias).dtype == torch.bfloat16
        assert project(x.to("meta"), weight.to("meta"), bias.to("meta")).is_meta
    assert served == []
    with torch.no_grad():
        project(x, weight, bias)
    assert served == [(4, 32)]
    with torch.no_grad():
        project(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert served == [(4, 32)] * 2


@torch.no_grad()
def test_without_a_compiler(monkeypatch):
    x, weight, bias = operands(4, 32, 64)
    expected = project(x, weight, bias)
    monkeypatch.setattr(kernel, "unavailable", lambda: "no compiler")
    torch.testing.assert_close(project(x, weight, bias), expected)


def test_compile_takes_the_plain_product(served):
    x, weight, bias = operands(4, 32, 64)
    with torch.no_grad():
        out = torch.compile(project, fullgraph=True)(x, weight, bias)
    torch.testing.assert_close(out, torch.addmm(bias, x, weight))
    assert served == []


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN makes products of any size, on a processor of any kind."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "ONEDNN_LEAST", 0)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_exact(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    assert error(found, exact) <= 2 * error(plain, exact) + 1e-7


# (rows, in, out): one of each, primes, a multiple of everything, more than a vector, and the shapes of GPT-2.
SHAPES = [(1, 1, 1), (1, 17, 5), (23, 7, 101), (64, 64, 192), (130, 192, 48), (256, 768, 2304), (300, 3072, 768)]


@pytest.mark.parametrize(("n", "n_in", "n_out"), SHAPES)
def test_value_and_gradients(onednn: None, n: int, n_in: int, n_out: int) -> None:
    data = randn(n, n_in), randn(n_in, n_out, seed=1), randn(n_out, seed=2)
    upstream = randn(n, n_out, seed=3)

    def run(dtype: torch.dtype) -> list[Tensor]:
        operands = [t.to(dtype).requires_grad_() for t in data]
        y = project(*operands)
        return [y.detach(), *torch.autograd.grad(y, operands, upstream.to(dtype))]

    exact = run(torch.float64)
    found = run(torch.float32)
    products.ONEDNN_LEAST = 1 << 60
    for a, b, c in zip(found, run(torch.float32), exact, strict=True):
        assert_as_exact(a, b, c)


@pytest.mark.parametrize(("n", "n_in", "n_out"), SHAPES)
def test_products_without_a_gradient(onednn: None, n: int, n_in: int, n_out: int) -> None:
    a, b, c = randn(n, n_in), randn(n_in, n_out, seed=1), randn(n, n_out, seed=2)
    A, B, C = a.double(), b.double(), c.double()
    assert_as_exact(multiply(a, b), a @ b, A @ B)
    assert_as_exact(multiply(c, b.t()), c @ b.t(), C @ B.t())
    assert_as_exact(weight_gradient(a, c), a.t() @ c, A.t() @ C)
    bias = randn(n_out, seed=3)
    with torch.no_grad():
        assert_as_exact(project(a, b, bias), torch.addmm(bias, a, b), bias.double() + A @ B)


@pytest.mark.parametrize("n", [5, products.BLOCK - 1, products.BLOCK, 2 * products.BLOCK + 3])
def test_sums_of_products(onednn: None, n: int) -> None:
    a, b, to = randn(13, n), randn(13, 24, seed=1), torch.full((n, 24), float("nan"))
    add_transposed_product(to, a, b, first=True)  # whatever the memory held
    exact = a.double().t() @ b.double()
    assert_as_exact(to, a.t() @ b, exact)
    add_transposed_product(to, a, b, first=False)
    assert_as_exact(to, 2 * (a.t() @ b), 2 * exact)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_the_loss(onednn: None, reduction: str) -> None:
    hidden, weight, targets = randn(23, 32), randn(101, 32, seed=1), torch.arange(23) * 4
    targets[::5] = -100
    upstream = torch.linspace(0.5, 2, 23) if reduction == "none" else torch.tensor(3.0)

    def run(dtype: torch.dtype) -> list[Tensor]:
        data = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        loss = linear_cross_entropy(*data, targets, reduction=reduction, chunk_size=7)
        return [loss.detach(), *torch.autograd.grad(loss, data, upstream.to(dtype))]

    exact, found = run(torch.float64), run(torch.float32)
    products.ONEDNN_LEAST = 1 << 60
    for a, b, c in zip(found, run(torch.float32), exact, strict=True):
        assert error(a, c) <= 2 * error(b, c) + 1e-7


def test_all_products_of_a_training_step_are_oneDNNs(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, linear = [], products.onednn_linear  # a mode does not look into the loss, which is one operation
    monkeypatch.setattr(products, "onednn_linear", lambda *operands: calls.append(operands) or linear(*operands))
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=211, n_positions=32, n_embd=64, n_layer=2, n_head=4))
    ids = torch.randint(211, (3, 32))
    with CountOperations() as mode:
        model.loss(ids, ids).backward()
    assert mode.counts["mkldnn_linear_backward_weights"] == 4 * 2
    assert len(calls) == (4 + 4) * 2 + 3  # forward and the gradients of the inputs; head and loss, in one chunk
    assert not mode.counts["mm"] + mode.counts["addmm"] + mode.counts["addmm_"]


def test_only_gradients_that_are_wanted_are_computed(onednn: None) -> None:
    x, weight, bias = randn(9, 16), nn.Parameter(randn(16, 8)), nn.Parameter(randn(8))
    with CountOperations() as mode:
        project(x, weight, bias).sum().backward()
    assert mode.counts["_linear_pointwise"] == 1  # x wants none
    assert mode.counts["mkldnn_linear_backward_weights"] == 1
    weight.requires_grad_(False)
    with CountOperations() as mode:
        project(x.requires_grad_(), weight, bias).sum().backward()
    assert mode.counts["_linear_pointwise"] == 2
    assert mode.counts["mkldnn_linear_backward_weights"] == 0
    assert not project(x.detach(), weight, bias.detach()).requires_grad


def test_the_rest_is_served_all_the_same(onednn: None) -> None:
    x, weight, bias = randn(9, 16), nn.Parameter(randn(16, 8)), nn.Parameter(randn(8))
    expected = torch.addmm(bias, x, weight)
    with CountOperations() as mode:
        for dtype in (torch.float64, torch.float16):
            assert project(x.to(dtype), weight.to(dtype), bias.to(dtype)).dtype == dtype
        assert project(x.to("meta"), weight.to("meta"), bias.to("meta")).is_meta
        torch.testing.assert_close(torch.func.vmap(lambda row: project(row[None], weight, bias)[0])(x), expected)
    assert not mode.counts["_linear_pointwise"]
    with torch.autocast("cpu", torch.bfloat16):
        assert project(x, weight, bias).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(project, fullgraph=True)(x, weight, bias), expected)
    assert project(x[:0], weight, bias).shape == (0, 8)
    torch.testing.assert_close(project(x.t().contiguous().t(), weight, bias), expected)  # rows that lie apart
    torch.testing.assert_close(project(x[:, ::2], weight[::2], bias), x[:, ::2] @ weight[::2] + bias)


def test_it_can_be_switched_off_and_small_products_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    assert products.onednn_serves(1 << 24)
    assert not products.onednn_serves((1 << 24) - 1)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        assert not products.onednn_serves(1 << 24)
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


def test_second_derivatives(onednn: None) -> None:
    data = [randn(4, 16).requires_grad_(), nn.Parameter(randn(16, 8)), nn.Parameter(randn(8))]

    def second(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(f(*data).pow(3).sum(), data, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), data)

    for found, expected in zip(second(project), second(lambda x, w, b: torch.addmm(b, x, w)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("grad_x", "grad_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_kept_is_what_addmm_keeps(onednn: None, grad_x: bool, grad_weight: bool) -> None:
    x, weight, bias = randn(9, 16).requires_grad_(grad_x), randn(16, 8).requires_grad_(grad_weight), randn(8)
    bias.requires_grad_()

    def kept(f: Callable[..., Tensor]) -> list[torch.Size]:
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            f(x, weight, bias)
        return sorted(shapes)

    assert kept(project) == kept(lambda x, w, b: torch.addmm(b, x, w))


def test_a_compiler_sees_the_plain_product_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of how the choice is made, which it could not trace."""
    monkeypatch.setattr(products, "ONEDNN_LEAST", 0)
    x, weight, bias = randn(9, 16), nn.Parameter(randn(16, 8)), nn.Parameter(randn(8))
    compiled = torch.compile(project, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), torch.addmm(bias, x, weight))


@pytest.mark.parametrize(
    ("vendor", "family", "chosen"),
    [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("AuthenticAMD", 23, False), ("GenuineIntel", 6, False)],
)
def test_the_processors_that_choose_it(vendor: str, family: int, chosen: bool) -> None:
    info = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\nmodel name\t: some 26\n"
    assert products._is_zen_5(info * 2) == chosen
    assert not products._is_zen_5("processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\n")


def test_the_choice_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for faster, said in ((True, "oneDNN's (AMD's Zen 5)"), (False, "torch.mm's")):
        monkeypatch.setattr(products, "_onednn_is_faster", lambda faster=faster: faster)
        assert products.explain_products() == said


def test_operands_of_any_layout_for_onednn(onednn: None) -> None:
    """Its operation takes a bias for contiguous."""
    for made in (lambda *s: randn(*s, 2)[..., 1], lambda *s: randn(1).expand(s), lambda *s: torch._neg_view(randn(*s))):
        x, weight, bias = made(9, 16), made(16, 8), made(8)
        exact, plain = x.double() @ weight.double() + bias.double(), torch.addmm(bias, x, weight)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                assert error(project(x, weight, bias), exact) <= 2 * error(plain, exact) + 1e-7
        assert error(multiply(x, weight), x.double() @ weight.double()) <= 1e-6
        assert error(weight_gradient(x.t(), weight), x.double() @ weight.double()) <= 1e-6


@pytest.fixture
def tiles(needs_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 are made on AMX, of any size."""
    monkeypatch.setattr(products, "_bfloat16_unit_to_use", lambda: "amx_bf16")
    monkeypatch.setattr(products, "ONEDNN_LEAST", 0)


@pytest.mark.parametrize(("n", "n_in", "n_out"), [(0, 16, 8), *SHAPES])
def test_products_by_tiles(tiles: None, n: int, n_in: int, n_out: int) -> None:
    """With the error of the plain ones; the gradient of a weight without the rounding of its product."""
    x, grad = randn(n, n_in).bfloat16(), randn(n, n_out, seed=1).bfloat16()
    weight, bias = randn(n_in, n_out, seed=2).bfloat16(), randn(n_out, seed=3).bfloat16()
    found, exact = weight_gradient(x, grad), x.double().t() @ grad.double()
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 2 * (x.float().t() @ grad.float() - exact).norm() + 1e-6 * exact.norm()
    exact = grad.double() @ weight.double().t()
    found = multiply(grad, weight.float().t())
    assert (found - exact).norm() <= 2 * (grad @ weight.t() - exact).norm()
    with torch.no_grad():
        exact = x.double() @ weight.double() + bias.double()
        found = project(x, weight, bias)
        assert found.dtype == torch.bfloat16
        assert (found - exact).norm() <= 2 * (torch.addmm(bias, x, weight) - exact).norm()


def test_all_products_of_a_training_step_are_by_tiles(tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, and of bfloat16 weights; and its gradients are no further from float64's."""
    shapes, matmul = [], kernel.matmul  # a mode does not look into the loss, which is one operation
    monkeypatch.setattr(kernel, "matmul", lambda a, b, *r, **o: shapes.append(a.shape) or matmul(a, b, *r, **o))
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=211, n_positions=32, n_embd=64, n_layer=2, n_head=4)).eval()
    ids = torch.randint(211, (3, 32))

    def gradients(dtype: torch.dtype, autocast: bool) -> Tensor:
        model.to(dtype).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.loss(ids, ids).backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    exact = gradients(torch.float64, False)
    with CountOperations() as mode:
        found = gradients(torch.float32, True)
    assert len(shapes) == 3 * 4 * 2 + 3
    assert not mode.counts["mm"] + mode.counts["addmm"] + mode.counts["_linear_pointwise"]
    monkeypatch.setattr(products, "_bfloat16_unit_to_use", lambda: None)
    plain = gradients(torch.float32, True)
    assert len(shapes) == 3 * 4 * 2 + 3
    assert (found - exact).norm() <= 1.1 * (plain - exact).norm()
    monkeypatch.setattr(products, "_bfloat16_unit_to_use", lambda: "amx_bf16")
    gradients(torch.bfloat16, False)
    assert len(shapes) == 2 * (3 * 4 * 2 + 3)


def test_products_of_others_by_tiles(tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of bfloat16 matrices, as torch.optim.Muon's are, and no others."""
    counts, matmul = [], kernel.matmul
    monkeypatch.setattr(kernel, "matmul", lambda *a, **o: counts.append(1) or matmul(*a, **o))
    a, b, c = randn(40, 24).bfloat16(), randn(24, 56, seed=1).bfloat16(), randn(40, 56, seed=2).bfloat16()
    exact = a.double() @ b.double()
    with torch.no_grad(), TiledProducts():
        served = a @ b, torch.addmm(c, a, b), torch.addmm(c, a, b, beta=0.5, alpha=-3)
        assert len(counts) == 3
        others = torch.addmm(c[0], a, b), a.float() @ b.float(), a[None] @ b, a @ b[:, 0]
        assert torch.equal(torch.mm(a, b, out=torch.empty_like(c)), torch.addmm(c, a, b, beta=0, out=c.clone()))
        for refused in (lambda: a @ b.float(), lambda: a @ a):
            with pytest.raises(RuntimeError):
                refused()
        with torch.enable_grad():
            assert torch.autograd.grad((a.requires_grad_() @ b).sum(), a)[0].any()
        assert len(counts) == 3
        assert torch.addmm(torch.full_like(c, torch.nan), a, b, beta=0).isfinite().all()  # as torch.addmm has it
        assert len(counts) == 4
    for found, truth in zip(served, (exact, exact + c, -3 * exact + 0.5 * c.double()), strict=True):
        assert ((found - truth).abs() <= truth.abs() * 2**-8 + 1e-5).all()
    plain = torch.addmm(c[0], a, b), a.float() @ b.float(), a[None] @ b, a @ b[:, 0]
    assert all(torch.equal(x, y) for x, y in zip(others, plain, strict=True))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_all_products_of_muon_are_by_tiles(tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step differs from that by plain products no more than bfloat16 explains."""
    steps = []
    for unit in ("amx_bf16", None):
        monkeypatch.setattr(products, "_bfloat16_unit_to_use", lambda unit=unit: unit)
        torch.manual_seed(0)
        model = GPT2(GPT2Config(vocab_size=31, n_positions=8, n_embd=32, n_layer=1, n_head=2))
        before = [p.detach().clone() for p in model.h.parameters()]
        model.loss(torch.arange(8)[None], torch.arange(1, 9)[None]).backward()
        recipe = {"lr": 0.02, "embedding_lr": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.95)}
        with CountOperations() as mode:
            make_optimizer(model, "muon", **recipe).step()
        by_tiles, others = (("matmul", "matmul_add"), ("mm", "addmm"))[:: 1 if unit else -1]
        assert [mode.counts[name] for name in by_tiles + others] == [30, 60, 0, 0]  # of six matrices
        steps.append(torch.cat([(p - q).flatten() for p, q in zip(model.h.parameters(), before, strict=True)]))
    assert error(steps[0], steps[1].double()) <= 0.02


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_loss_by_tiles(tiles: None, head: torch.dtype, chunk_size: int | None) -> None:
    """Under autocast, a head of any dtype: no further from float64's than with plain products."""
    hidden, weight, targets = randn(23, 32), randn(101, 32, seed=1).to(head), torch.arange(23) * 4
    targets[::5] = -100

    def run(dtype: torch.dtype | None) -> list[Tensor]:
        data = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            loss = linear_cross_entropy(*data, targets, chunk_size=chunk_size)
        return [loss.detach(), *torch.autograd.grad(loss, data)]

    exact, found = run(torch.float64), run(None)
    assert found[2].dtype == head
    products._bfloat16_unit_to_use = lambda: None
    for a, b, c in zip(found, run(None), exact, strict=True):
        assert error(a, c) <= 1.5 * error(b, c) + 1e-3


def test_products_by_tiles_of_any_layout(tiles: None) -> None:
    for made in (lambda *s: randn(*s, 2).bfloat16()[..., 1], lambda *s: torch._neg_view(randn(*s).bfloat16())):
        for n_in, n_out in ((48, 80), (80, 48)):
            x, grad = made(33, n_in), made(33, n_out)
            exact = x.double().t() @ grad.double()
            assert error(weight_gradient(x, grad), exact) <= 2 * error(x.t() @ grad, exact)
    torch.use_deterministic_algorithms(True)  # with which PyTorch fills new memory with NaN
    try:
        assert weight_gradient(randn(33, 48).bfloat16(), randn(33, 80).bfloat16()).isfinite().all()
        assert multiply(randn(33, 80).bfloat16(), randn(80, 48).bfloat16()).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("n", [5, 1000])
def test_sums_of_products_by_tiles(tiles: None, n: int) -> None:
    a, b, to = randn(13, n).bfloat16(), randn(13, 24, seed=1).bfloat16(), torch.full((n, 24), float("nan"))
    add_transposed_product(to, a, b, first=True)  # whatever the memory held
    exact = a.double().t() @ b.double()
    assert error(to, exact) <= 1e-6
    add_transposed_product(to, a, b, first=False)
    assert error(to, 2 * exact) <= 1e-6


@pytest.mark.parametrize(("isa", "unit"), [("", "amx_bf16"), ("AVX512_CORE_AMX", "amx_bf16"), ("AVX2", None)])
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_what_onednn_is_kept_from_the_kernel_does_not_use(
    monkeypatch: pytest.MonkeyPatch, isa: str, unit: str | None, name: str
) -> None:
    monkeypatch.setattr(products, "bfloat16_unit", lambda: "amx_bf16")
    monkeypatch.setattr(products, "has_onednn", lambda: True)
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, isa)
    assert products._bfloat16_unit_to_use.__wrapped__() == unit
    monkeypatch.setenv(name, "AVX512_CORE_BF16")
    assert products._bfloat16_unit_to_use.__wrapped__() == "avx512_bf16"


@pytest.mark.parametrize(("n", "n_in", "n_out"), [(0, 16, 8), *SHAPES])
def test_autocast_in_bfloat16(n: int, n_in: int, n_out: int) -> None:
    """With the error of PyTorch's own products, and the same bits with gradients as without."""
    x, weight, bias = randn(n, n_in), randn(n_in, n_out, seed=1).requires_grad_(), randn(n_out, seed=2)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found, plain = project(x, weight, bias), torch.addmm(bias, x, weight)
        with torch.no_grad():
            assert torch.equal(project(x, weight, bias), found)
    rounded = [t.detach().bfloat16().double() for t in (bias, x, weight)]
    exact = torch.addmm(*rounded)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 2 * (plain - exact).norm() + 1e-7 * exact.norm()
    strided = torch.stack([bias, -bias], 1)[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(project(x, weight, strided), found)


def test_who_makes_the_products_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's operation, where nothing keeps autocast's casts; whoever kept them has each weight cast once."""
    x, weight, bias = randn(96, 64), randn(64, 128).requires_grad_(), randn(128)
    served = products._bfloat16_unit_to_use() is not None
    monkeypatch.setattr(products, "_bfloat16_unit_to_use", lambda: "avx512_bf16" if served else None)
    for gradients, keeps, own in ((True, True, True), (True, False, True), (False, False, True), (False, True, False)):
        autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps)
        with CountOperations() as mode, autocast, torch.set_grad_enabled(gradients):
            project(x, weight, bias)
        assert mode.counts["_linear_pointwise"] == (own and served)
        assert mode.counts["addmm"] == (not (own and served))


def test_tiles_make_all_products_of_autocast(tiles: None) -> None:
    """They need no casts that could be kept."""
    weight, bias = randn(64, 128).requires_grad_(), randn(128)
    few = (False, True, products.MANY - 1)  # for which the casts that are kept are read faster
    for gradients, keeps, rows in ((True, True, 96), (False, False, 96), (False, True, products.MANY), few):
        x = randn(rows, 64)
        autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps)
        with CountOperations() as mode, autocast, torch.set_grad_enabled(gradients):
            project(x, weight, bias)
        assert mode.counts["matmul"] == (rows != products.MANY - 1)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        assert not products.tiles_multiply(1 << 30)
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


def test_operands_that_onednn_does_not_take_as_pytorch_does(onednn: None) -> None:
    x, weight = randn(64, 40), randn(40, 48, seed=1)
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            for shape in ((), (1,), (1, 48), (64, 48)):
                bias = randn(1, *shape, seed=2)[0]
                torch.testing.assert_close(project(x, weight, bias), torch.addmm(bias, x, weight))
            assert project(x[:, :0], weight[:0], randn(48)).equal(torch.addmm(randn(48), x[:, :0], weight[:0]))
            for wrong in ((x, weight[:39], randn(48)), (x, weight, randn(47))):
                with pytest.raises(RuntimeError, match=r"shape|size"):
                    project(*wrong)


def test_a_trace_and_a_backward_pass_under_another_autocast_take_the_plain_products(tiles: None) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, weight, bias = randn(33, 96), randn(96, 32, seed=1).requires_grad_(), randn(32, seed=2).requires_grad_()

    def gradient(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            y = project(x, weight, bias)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.bfloat16):
            return torch.autograd.grad(y.float().square().sum(), (weight, bias))

    expected = gradient(x)
    torch.testing.assert_close(make_fx(lambda x: gradient(x))(x)(x), expected, rtol=2**-7, atol=0.2)
    torch.testing.assert_close(gradient(x, torch.float16), expected, rtol=2**-7, atol=0.2)


def test_to_ask_who_serves_is_no_operation() -> None:
    """Recomputation looks at a block's operations, and they must be the same the second time."""
    x, weight, bias = randn(96, 64), randn(64, 128).requires_grad_(), randn(128)
    counts = []
    for _ in range(2):
        for cached in (products._bfloat16_unit_to_use, products._onednn_is_faster):
            cached.cache_clear()
        with CountOperations() as mode, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            for _ in range(1 + len(counts)):
                project(x, weight, bias)
        counts.append(mode.counts)
    first, second = counts
    assert {name: 2 * count for name, count in first.items()} == second


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_products_in_bfloat16_agree_whatever_the_processor_has(isa: str, name: str) -> None:
    """A processor without bfloat16, one that has AVX-512 alone, and this one: the same step to rounding."""
    code = """if True:
        import torch
        from minigpt2.ops.products import project
        torch.manual_seed(0)
        x, w, b = torch.randn(96, 64), torch.randn(64, 128, requires_grad=True), torch.randn(128)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = project(x, w, b)
        y.float().square().sum().backward()
        exact = x.double() @ w.double() + b.double()
        print(float((y - exact).norm() / exact.norm()))
        exact_grad = x.double().t() @ (2 * exact)
        print(float((w.grad - exact_grad).norm() / exact_grad.norm()))
    """
    environment = os.environ | {name: isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 2
    assert max(errors) < 2**-7  # that of rounding to 8 bits, a few times
