"""The products of few rows: the kernel's error, what it serves, and that nothing but the sizes decides its sums."""

import pytest
import torch
from torch import nn

from minigpt2.ops import kernel
from minigpt2.ops.products import project, project_transposed


@pytest.fixture(autouse=True)
def needs_the_kernel():
    reason = kernel.unavailable()
    if reason is not None and "no C++ compiler" in reason:
        pytest.skip(reason)
    assert reason is None  # where there is a compiler, a kernel that does not build is a failure


@pytest.fixture
def served(monkeypatch):
    """The shapes of the products that the kernel made."""
    shapes, few_rows = [], kernel.few_rows
    monkeypatch.setattr(kernel, "few_rows", lambda *args: shapes.append(tuple(args[0].shape)) or few_rows(*args))
    return shapes


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
    for n in (1, 2, 3):
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
        for dtype in (torch.float64, torch.bfloat16):
            assert project(x.to(dtype), weight.to(dtype), bias.to(dtype)).dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert project(x, weight, bias).dtype == torch.bfloat16
        assert project(x.to("meta"), weight.to("meta"), bias.to("meta")).is_meta
    assert served == []
    with torch.no_grad():
        project(x, weight, bias)
    assert served == [(4, 32)]


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
