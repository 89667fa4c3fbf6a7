"""The operation as a citizen of torch: opcheck, compile, autocast, recomputation, functional calls, threads."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minigpt2.ops.attention import attention, masked_attention
from minigpt2.ops.attention.fused import decode, fused_attention


class Layer(nn.Module):
    def __init__(self, width=128, n_head=2, p=0.1):
        super().__init__()
        self.project, self.n_head, self.p = nn.Linear(width, 3 * width), n_head, p

    def forward(self, x):
        return attention(self.project(x), self.n_head, dropout_p=self.p, backend="fused")


def packed(B=2, T=20, H=2, D=16, dtype=torch.float32):
    return torch.randn(B, T, 3 * H * D, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype, p):
    qkv, seed = packed(dtype=dtype), torch.tensor(3) if p else None
    forward, backward = torch.ops.minigpt2.attention.default, torch.ops.minigpt2.attention_backward.default
    torch.library.opcheck(forward, (qkv, 2, p, seed))
    torch.library.opcheck(forward, (qkv.clone().requires_grad_(), 2, p, seed))
    out, lse = forward(qkv, 2, p, seed)
    torch.library.opcheck(backward, (torch.randn_like(out), qkv, out, lse, 2, p, seed))


def test_opcheck_decode():
    q, k, v = torch.randn(2, 3, 1, 16), *torch.randn(2, 2, 3, 40, 16)[..., :30, :]
    torch.library.opcheck(torch.ops.minigpt2.decode.default, (q, k, v))


@pytest.mark.parametrize(("T", "H", "D"), [(1, 1, 16), (4, 1, 16), (70, 1, 16)])
def test_gradcheck(T, H, D):
    qkv = packed(1, T, H, D, torch.float64).requires_grad_()
    fast = T > 20
    assert torch.autograd.gradcheck(lambda x: fused_attention(x, H), qkv, fast_mode=fast)
    seed = torch.tensor(5)
    assert torch.autograd.gradcheck(lambda x: torch.ops.minigpt2.attention(x, H, 0.3, seed)[0], qkv, fast_mode=fast)


def test_a_second_derivative_is_refused():
    qkv = packed().requires_grad_()
    (grad,) = torch.autograd.grad(fused_attention(qkv, 2).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("p", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_compile_without_a_graph_break(p):
    layer, x = Layer(p=p), torch.randn(2, 30, 128)
    compiled = torch.compile(layer, fullgraph=True)
    out = compiled(x)
    out.sum().backward()
    gradient = layer.project.weight.grad.clone()
    assert gradient.isfinite().all()
    if p == 0.0:
        layer.zero_grad()
        expected = layer(x)
        expected.sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradient, layer.project.weight.grad)


def test_compile_auto_and_decode():
    def step(q, k, v, qkv):
        return decode(q, k, v), attention(qkv, 2)

    q, k, v, qkv = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), packed()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(q, k, v, qkv), step(q, k, v, qkv))


def test_autocast_gives_bfloat16_and_matches_it():
    layer, x = Layer(p=0.0), torch.randn(2, 30, 128)
    with torch.autocast("cpu", torch.bfloat16):
        qkv, out = layer.project(x), layer(x)
    assert qkv.dtype == out.dtype == torch.bfloat16
    assert torch.equal(out, fused_attention(qkv, 2))
    out.float().sum().backward()
    assert layer.project.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_attention(packed(), 2).dtype == torch.float32  # what comes in float32 is computed in float32


def test_recomputation_is_bit_exact():
    layer, x = Layer(), torch.randn(2, 100, 128)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer.zero_grad()
        out = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        out.square().sum().backward()
        gradients.append((out.detach(), layer.project.weight.grad.clone()))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_saved_tensors_are_four_and_each_once():
    saved = []
    qkv = packed().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = fused_attention(qkv, 2, dropout_p=0.1)
    assert sorted(x.numel() for x in saved) == sorted([qkv.numel(), out.numel(), 2 * 2 * 20, 1])


def test_functional_call():
    layer, x = Layer(p=0.0), torch.randn(2, 10, 128)
    parameters = {name: (2 * value).detach().requires_grad_() for name, value in layer.named_parameters()}
    out = torch.func.functional_call(layer, parameters, (x,))
    expected = attention(nn.functional.linear(x, *parameters.values()), 2, backend="fused")
    assert torch.equal(out, expected)
    out.sum().backward()
    assert parameters["project.weight"].grad is not None
    assert layer.project.weight.grad is None


def test_two_models_in_two_threads():
    layers, inputs = (
        [Layer(p=0.0), Layer(width=256, n_head=4, p=0.0)],
        [torch.randn(2, 200, 128), torch.randn(1, 333, 256)],
    )
    expected = [layer(x).detach() for layer, x in zip(layers, inputs, strict=True)]
    wrong = []

    def work(i):
        for _ in range(20):
            out = layers[i](inputs[i])
            (gradient,) = torch.autograd.grad(out.sum(), layers[i].project.weight)
            if not torch.equal(out, expected[i]) or not gradient.isfinite().all():
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize(("D", "dtype", "why"), [(24, torch.float32, "head sizes"), (16, torch.float16, "float16")])
def test_what_the_kernel_does_not_serve(D, dtype, why):
    from minigpt2.ops.attention import _warn_once

    _warn_once.cache_clear()
    qkv = packed(D=D, dtype=dtype)
    with pytest.raises(RuntimeError, match=why):
        attention(qkv, 2, backend="fused")
    with pytest.warns(UserWarning, match=why):
        out = attention(qkv, 2)
    assert torch.equal(out, attention(qkv, 2, backend="sdpa"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(qkv, 2)  # said once
    with pytest.raises(ValueError, match="attention backend must be one of"):
        attention(qkv, 2, backend="flash")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [16, 64, 80, 256])
@pytest.mark.parametrize("T", [1, 15, 16, 63, 64, 65, 300])
@pytest.mark.parametrize("B", [1, 8])
def test_decode(B, T, D, dtype):
    torch.manual_seed(T)
    H = 3
    k, v = torch.randn(2, B, H, 310, D).to(dtype)[:, :, :, :T]
    q = torch.randn(B, 1, H, D).to(dtype).transpose(1, 2)
    exact = (q.double() @ k.double().transpose(-2, -1) / D**0.5).softmax(-1) @ v.double()
    plain = (q @ k.transpose(-2, -1) / D**0.5).softmax(-1) @ v
    out = decode(q, k, v)
    assert out.shape == (B, H, 1, D)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()


def test_one_query_with_gradients_takes_another_path():
    q, k, v = torch.randn(1, 2, 1, 16, requires_grad=True), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    y = masked_attention(q, k, v, None)
    y.sum().backward()
    assert q.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(masked_attention(q, k, v, None), y)
    with pytest.raises(RuntimeError, match="no gradient"):
        decode(q, k, v)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_heads_of_no_numbers(backend):
    """As PyTorch's own: scores of nothing are 0, and not a division by it."""
    assert attention(torch.zeros(2, 5, 0), 2, backend=backend).shape == (2, 5, 0)
    q, keys = torch.zeros(2, 2, 1, 0), torch.zeros(2, 2, 3, 0)
    assert masked_attention(q, keys, keys, None, backend=backend).shape == (2, 1, 0)
