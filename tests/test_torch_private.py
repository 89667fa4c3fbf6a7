"""PyTorch's private names: which of them are gone, and that nothing but time and memory depends on them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minigpt2 import GPT2, GPT2Config, torch_private
from minigpt2.ops import products
from minigpt2.recompute import RECOMPUTE

MARK = "_dynamo_marked_constant"
# Without dropout, whose masks are drawn in another way on the plain path.
CONFIG = GPT2Config(
    vocab_size=199, n_positions=32, n_embd=64, n_layer=2, n_head=4, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0
)


def test_no_name_is_gone() -> None:
    gone = torch_private.missing()
    if not hasattr(torch.compiler.assume_constant_result(lambda: None), MARK):
        gone.append(MARK)
    assert not gone, f"torch {torch.__version__} lacks {', '.join(gone)}: see torch_private.py for what that costs"


@pytest.fixture
def zen_5(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor for which oneDNN makes the products, of any size, where PyTorch has its operations."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products, "_is_zen_5", lambda info: True)
    monkeypatch.setattr(products, "_onednn_is_faster", products._onednn_is_faster.__wrapped__)
    monkeypatch.setattr(products, "ONEDNN_LEAST", 0)
    assert products.onednn_serves(1) == torch.backends.mkldnn.is_available()


def results(loss_of: Callable[[GPT2], Callable[..., Tensor]] = lambda model: model.loss) -> list[Tensor]:
    """Losses and gradients at each mode of recomputation, the ids of a generation and the logits of its end."""
    torch.manual_seed(0)
    model = GPT2(CONFIG, checkpoint_every=1)
    ids, found = torch.randint(199, (2, 17)), []
    for model.recompute in RECOMPUTE:
        loss = loss_of(model)(ids[:, :-1], ids[:, 1:])
        found += [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    generated = model.eval().generate(ids, 8, temperature=0)
    with torch.no_grad():
        return [*found, generated, model(generated)[:, -1]]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", torch_private.NAMES)
def test_without_a_name_the_results_are_the_same(zen_5: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    expected, found = results(), torch_private.found
    monkeypatch.setattr(torch_private, "found", lambda other: None if other == name else found(other))
    assert torch_private.missing() == [name]
    assert_same(results(), expected)


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_without_the_mark_a_compiled_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results()
    marked = {
        value
        for module in list(sys.modules.values())
        if module.__name__.startswith("minigpt2.ops")
        for value in vars(module).values()
        if hasattr(value, MARK) and not isinstance(value, type)
    }
    assert marked
    for function in marked:
        monkeypatch.delattr(function, MARK)
    torch.compiler.reset()
    assert_same(results(lambda model: torch.compile(model.loss, backend="eager")), expected)
