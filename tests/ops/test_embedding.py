"""The embedding and the head as one operation: the gradients of two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt2 import GPT2, GPT2Config
from minigpt2.ops import embedding as module
from minigpt2.ops.embedding import embed

V, C = 50, 16


@pytest.fixture
def wte() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(V, C)


@pytest.fixture
def tied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call that was one operation, that it was."""
    calls, apply = [], module._Tied.apply
    monkeypatch.setattr(module._Tied, "apply", lambda *args: calls.append(True) or apply(*args))
    return calls


IDS = torch.tensor([[3, 7, 3, 3], [49, 0, 7, 11]])


def logits(wte: nn.Embedding, *, together: bool = True) -> Tensor:
    rows, head = embed(wte, IDS, wte.weight) if together else (wte(IDS), wte.weight)
    return F.linear(rows.tanh(), head)


def gradient(wte: nn.Embedding, loss: Tensor, **options: Any) -> Tensor:
    (found,) = torch.autograd.grad(loss, [wte.weight], **options)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_both_uses_reach_the_weight(wte: nn.Embedding, tied: list[bool], dtype: torch.dtype) -> None:
    wte.to(dtype)
    found = gradient(wte, logits(wte).square().sum())
    assert tied == [True]
    expected = gradient(wte, logits(wte, together=False).square().sum())
    assert torch.equal(found, expected)
    assert found.count_nonzero() > 0


def test_there_is_one_gradient_of_the_weight_s_size(wte: nn.Embedding) -> None:
    """The rows are added to the head's, where it lies."""
    head_gradients = []
    rows, head = embed(wte, IDS, wte.weight)
    head.register_hook(lambda grad: head_gradients.append(grad.data_ptr()))
    F.linear(rows.tanh(), head).square().sum().backward()
    assert wte.weight.grad is not None
    assert [wte.weight.grad.data_ptr()] == head_gradients


def test_a_graph_that_is_kept_gives_the_same_again(wte: nn.Embedding) -> None:
    loss = logits(wte).square().sum()
    first = gradient(wte, loss, retain_graph=True).clone()
    assert torch.equal(gradient(wte, loss), first)


def test_second_derivatives(wte: nn.Embedding) -> None:
    found = [
        gradient(wte, gradient(wte, logits(wte, together=t).square().sum(), create_graph=True).square().sum())
        for t in (True, False)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("use", ["rows", "head"])
def test_one_use_alone(wte: nn.Embedding, use: str) -> None:
    rows, head = embed(wte, IDS, wte.weight)
    found = gradient(wte, (rows if use == "rows" else head).square().sum())
    expected = gradient(wte, (wte(IDS) if use == "rows" else wte.weight).square().sum())
    assert torch.equal(found, expected)


def _forward(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, C)


class Other(nn.Embedding):
    """Somebody's own."""


@pytest.mark.parametrize(
    "change",
    [
        lambda wte: wte.register_forward_hook(lambda *_: None),
        lambda wte: wte.register_forward_pre_hook(lambda *_: None),
        lambda wte: wte.register_full_backward_hook(lambda *_: None),
        lambda wte: setattr(wte, "forward", _forward),
        lambda wte: setattr(wte, "max_norm", 0.5),
        lambda wte: setattr(wte, "padding_idx", 3),
        lambda wte: setattr(wte, "scale_grad_by_freq", True),
        lambda wte: setattr(wte, "sparse", True),
        lambda wte: setattr(wte, "__class__", Other),
        lambda wte: wte.requires_grad_(False),
    ],
)
def test_an_embedding_that_is_more_than_a_lookup_is_called(wte: nn.Embedding, tied: list[bool], change: Any) -> None:
    change(wte)
    rows, head = embed(wte, IDS, wte.weight)
    assert not tied
    assert head is wte.weight
    assert torch.equal(rows, wte(IDS))


def test_hooks_of_all_modules_are_called(wte: nn.Embedding, tied: list[bool]) -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        embed(wte, IDS, wte.weight)
    finally:
        handle.remove()
    assert (seen, tied) == ([wte], [])


def test_the_model_has_them_as_one(tied: list[bool]) -> None:
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=C, vocab_size=V, n_positions=8))
    for use in (model(IDS).sum(), model.loss(IDS, IDS)):
        use.backward()
    assert tied == [True, True]


def test_a_head_of_its_own_stays_apart(tied: list[bool]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=1, n_embd=C, vocab_size=V, n_positions=8, tie_word_embeddings=False)
    model = GPT2(config)
    model.loss(IDS, IDS).backward()
    assert not tied
    assert model.wte.weight.grad is not None
    # In the rows that were looked up, and nowhere else.
    assert model.wte.weight.grad.any(1).nonzero().flatten().tolist() == IDS.unique().tolist()
