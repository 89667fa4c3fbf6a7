"""A checkpoint: the numbers, the random state and the graph of the function it runs twice, and what it keeps of it."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.checkpoint import Kept, _generator, checkpoint

WEIGHT = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def layer(x: Tensor) -> Tensor:
    return x + F.dropout(torch.tanh(x @ WEIGHT).exp() @ WEIGHT.t(), 0.3)


def kept_products() -> Any:
    def rule() -> Callable[[Any], bool]:
        return lambda operation: operation is torch.ops.aten.mm.default

    return Kept(rule).contexts()


def plain(x: Tensor) -> Tensor:
    return layer(layer(x))


def once(x: Tensor) -> Tensor:
    return checkpoint(plain, x)


def nested(x: Tensor) -> Tensor:
    return checkpoint(lambda x: checkpoint(layer, checkpoint(layer, x)), x)


def keeping(x: Tensor) -> Tensor:
    return checkpoint(plain, x, contexts=kept_products(), early_stop=True)


def keeping_inside(x: Tensor) -> Tensor:
    return checkpoint(lambda x: layer(checkpoint(layer, x, contexts=kept_products())), x)


WAYS = [once, nested, keeping, keeping_inside]


def numbers(function: Callable[[Tensor], Tensor], **settings: Any) -> list[Tensor]:
    torch.manual_seed(3)
    y = function(X)
    inside = torch.rand(())
    gradients = torch.autograd.grad(y.square().sum(), (X, WEIGHT), **settings)
    return [y.detach(), inside, torch.rand(()), *gradients]


@pytest.mark.parametrize("way", WAYS)
def test_numbers_and_random_state_are_those_of_the_function(way) -> None:
    for found, expected in zip(numbers(way), numbers(plain), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_that_is_retained_is_read_again(way) -> None:
    torch.manual_seed(3)
    loss = way(X).square().sum()
    first = torch.autograd.grad(loss, (X, WEIGHT), retain_graph=True)
    part = torch.autograd.grad(loss, X, retain_graph=True)
    last = torch.autograd.grad(loss, (X, WEIGHT))
    expected = numbers(plain)[3:]
    assert all(map(torch.equal, first, expected))
    assert all(map(torch.equal, last, expected))
    assert torch.equal(part[0], expected[0])
    with pytest.raises(RuntimeError, match=r"a second time|was read before"):
        torch.autograd.grad(loss, X)


@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives(way) -> None:
    def gradient_norm(function: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(3)
        (gradient,) = torch.autograd.grad(function(X).square().sum(), X, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), WEIGHT)[0]

    torch.testing.assert_close(gradient_norm(way), gradient_norm(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_autocast_is_that_of_the_first_run(way) -> None:
    def gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        x, weight = X.detach().float().requires_grad_(), WEIGHT.detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(lambda x: torch.tanh(x @ weight) @ weight.t(), x).float().sum()  # type: ignore[call-arg]
        return list(torch.autograd.grad(loss, (x, weight)))

    def expected(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return inner(x)

    for found, right in zip(gradients(checkpoint), gradients(expected), strict=True):  # type: ignore[arg-type]
        assert torch.equal(found, right)


def test_other_arguments_and_tensors_without_gradients() -> None:
    mask = torch.arange(8) % 2 == 0

    def function(x: Tensor, scale: float, nothing: None, mask: Tensor) -> Tensor:
        assert nothing is None
        return (x.exp() * scale).masked_fill(mask, 0.0)

    for x in (X, X.detach()):
        found, expected = checkpoint(function, x, 2.0, None, mask), function(x, 2.0, None, mask)
        assert torch.equal(found, expected)
        assert found.requires_grad == expected.requires_grad
    with torch.no_grad():
        assert torch.equal(checkpoint(function, X, 2.0, None, mask), expected)


def test_only_the_inputs_are_kept_and_nothing_outlives_the_backward_pass() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def function(x: Tensor) -> Tensor:
        middle = torch.sigmoid(x)
        seen.append(weakref.ref(middle.untyped_storage()))  # type: ignore[arg-type]
        return middle.exp()

    gc.disable()
    try:
        loss = checkpoint(function, X * 1.0).sum()
        assert [s() is None for s in seen] == [True]
        loss.backward()
        assert [s() is None for s in seen] == [True, True]
    finally:
        gc.enable()
        X.grad = None


def test_what_runs_differently_the_second_time_is_an_error() -> None:
    runs: list[int] = []

    def other_shape(x: Tensor) -> Tensor:
        runs.append(1)
        return x[: len(runs)].exp().sum()

    def less(x: Tensor) -> Tensor:
        runs.append(1)
        return x.exp() if len(runs) == 1 else x + 1

    def more(x: Tensor) -> Tensor:
        runs.append(1)
        return x.exp() if len(runs) == 1 else x.exp().exp()

    with pytest.raises(RuntimeError, match=r"saved \(\(2, 8\), torch.float64, .* where it had saved \(\(1, 8\)"):
        checkpoint(other_shape, X).backward()
    for function, saved in ((less, 0), (more, 2)):
        runs.clear()
        with pytest.raises(RuntimeError, match=f"saved {saved} tensors where it had saved 1"):
            checkpoint(function, X).sum().backward()


def test_what_was_kept_and_then_changed_in_place_is_an_error() -> None:
    def function(x: Tensor) -> Tensor:
        return (x @ WEIGHT).add_(1).exp()

    with pytest.raises(RuntimeError, match=r"mm.*was changed in place"):
        checkpoint(function, X, contexts=kept_products()).sum().backward()


def test_an_error_in_the_second_run_leaves_random_state_and_autocast_as_they_were() -> None:
    runs: list[int] = []

    def function(x: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == 2:
            torch.rand(3)
            raise ValueError("in the second run")
        return x.exp()

    with torch.autocast("cpu", torch.bfloat16):
        loss = checkpoint(function, X).sum()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="in the second run"):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.is_autocast_enabled("cpu")


TRAIN = """
import sys, torch
from minigpt2 import GPT2, GPT2Config
from minigpt2.training.optimizer import make_optimizer
model = GPT2(GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=3, n_head=2))
optimizer = make_optimizer(model, "adamw", lr=1e-3, embedding_lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
for model.recompute in ("block", "keep-attention", "pointwise"):
    for model.checkpoint_every in (0, 1, 2):
        model.loss(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
        optimizer.step()
print("torch._dynamo" in sys.modules)
"""


def test_no_notch_imports_pytorch_s_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_random_state_of_an_accelerator_is_restored(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On a module that stands in for it."""
    states = {"now": torch.tensor([1])}
    setter = (lambda state: states.update(now=state)) if kind == "mps" else (lambda state, _: states.update(now=state))
    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", lambda *device: states["now"])
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", setter)
    generator = _generator(torch.device(kind))
    assert generator is not None
    before = generator[0]()
    states["now"] = torch.tensor([2])
    generator[1](before)
    assert states["now"] is before
    assert _generator(torch.device("cpu")) is None
    assert _generator(torch.device("meta")) is None
