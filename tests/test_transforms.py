"""Transforms and tracers of PyTorch: each gives the right number, or an error that says what to do instead."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from minigpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(
    vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=2, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0
)


def make_model(attention: str = "auto", **settings: object) -> GPT2:
    torch.manual_seed(0)
    return GPT2(CONFIG, attention=attention, **settings).double()  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def parameters_of(model: GPT2) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


class Loss(nn.Module):
    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(input_ids, targets)


def loss_of(model: GPT2, parameters: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
    wrapped = {f"model.{name}": p for name, p in parameters.items()}
    return torch.func.functional_call(Loss(model), wrapped, (ids, targets))


def direction(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}


def gradients(model: GPT2) -> dict[str, Tensor]:
    loss = model.loss(*batch())
    return dict(zip(parameters_of(model), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.fixture(params=[("auto", 0, "block"), ("auto", 1, "block"), ("auto", 1, "pointwise"), ("eager", 0, "block")])
def model(request: pytest.FixtureRequest) -> GPT2:
    attention, k, recompute = request.param
    return make_model(attention, checkpoint_every=k, recompute=recompute)


def test_jvp_of_the_loss(model: GPT2) -> None:
    parameters = parameters_of(model)
    v = direction(parameters)
    _, tangent = torch.func.jvp(lambda p: loss_of(model, p, *batch()), (parameters,), (v,))
    expected = sum((g * v[name]).sum() for name, g in gradients(model).items())
    torch.testing.assert_close(tangent, expected)


def test_forward_mode_with_dual_tensors(model: GPT2) -> None:
    v = direction(parameters_of(model))
    expected = sum((g * v[name]).sum() for name, g in gradients(model).items())
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, v[name]) for name, p in parameters_of(model).items()}
        tangent = forward_ad.unpack_dual(loss_of(model, duals, *batch())).tangent
    torch.testing.assert_close(tangent, expected)


def test_jvp_of_the_logits(model: GPT2) -> None:
    parameters = parameters_of(model)
    v, h = direction(parameters), 1e-6
    f = functools.partial(torch.func.functional_call, model)
    _, tangent = torch.func.jvp(lambda p: f(p, (batch()[0],)), (parameters,), (v,))
    with torch.no_grad():
        ahead, behind = (f({n: p + s * v[n] for n, p in parameters.items()}, (batch()[0],)) for s in (h, -h))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-6)


def test_grad_and_vmap(model: GPT2) -> None:
    parameters = parameters_of(model)
    ids, targets = batch()
    found = torch.func.grad(lambda p: loss_of(model, p, ids, targets))(parameters)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)

    def one(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(model, p, x[None], y[None])

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(parameters, ids, targets)
    for name, gradient in found.items():
        torch.testing.assert_close(each[name].mean(0), gradient)


def test_jacrev_of_the_logits(model: GPT2) -> None:
    bias = model.ln_f.bias.detach()
    ids = batch()[0][:1, :3]

    def logits(b: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"ln_f.bias": b}, (ids,))[0, -1]

    torch.testing.assert_close(torch.func.jacrev(logits)(bias), model.wte.weight.detach())


def test_second_derivatives_by_the_plain_path() -> None:
    model = make_model("eager")
    ids, targets = batch()
    with pytest.raises(NotImplementedError, match=r"torch.nn.functional.cross_entropy of the logits"):
        torch.autograd.grad(model.loss(ids, targets), model.wpe.weight, create_graph=True)
    bias = model.h[0].mlp.c_fc.bias

    def gradient(values: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {"h.0.mlp.c_fc.bias": values}, (ids,))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return torch.autograd.grad(loss, values, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, (bias.detach().requires_grad_(),), atol=1e-8, nondet_tol=1e-12)
    fused = make_model()
    logits = fused(ids)
    (first,) = torch.autograd.grad(logits.square().sum(), fused.wpe.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative; use attention='eager'"):
        first.sum().backward()


def test_fused_by_name_says_what_to_do() -> None:
    model = make_model("fused")
    with pytest.raises(RuntimeError, match="use attention='eager'"):
        torch.func.grad(lambda p: loss_of(model, p, *batch()))(parameters_of(model))


@pytest.mark.filterwarnings("ignore")
def test_traces_compute_what_the_model_does() -> None:
    """On other ids than those that they were made with."""
    model = make_model().eval().requires_grad_(False)
    ids, others = batch()[0], batch()[0].flip(0, 1)
    expected = model(others)
    torch.testing.assert_close(torch.jit.trace(model, (ids,))(others), expected)
    torch.testing.assert_close(make_fx(lambda x: model(x))(ids)(others), expected)
    torch.testing.assert_close(torch.export.export(model, (ids,)).module()(others), expected)
    loss = make_fx(lambda x, y: model.loss(x, y))(*batch())
    torch.testing.assert_close(loss(others, ids), model.loss(others, ids))


def test_a_copy_of_a_model_that_has_run() -> None:
    model = make_model(checkpoint_every=1, recompute="pointwise")
    loss = model.loss(*batch())
    twin = copy.deepcopy(model)
    loss.backward()
    assert (twin.checkpoint_every, twin.recompute) == (1, "pointwise")
    assert all(p.grad is None for p in twin.parameters())
    assert torch.equal(twin.loss(*batch()), loss)
