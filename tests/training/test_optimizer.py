"""AdamW and Muon: which weights each moves, and by how much."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import train
from minigpt2 import GPT2, GPT2Config
from minigpt2.training import optimizer
from minigpt2.training.optimizer import make_optimizer
from minigpt2.training.settings import TrainConfig

RECIPE = {"lr": 0.02, "embedding_lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")


def model_with_gradients() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=31, n_positions=8))
    model.loss(torch.arange(8)[None], torch.arange(1, 9)[None]).backward()
    return model


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_every_weight_has_one_group_and_only_matrices_decay(kind: str) -> None:
    model = model_with_gradients()
    groups = make_optimizer(model, kind, **RECIPE).param_groups
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        group = found[id(p)]
        in_block = name.startswith("h.") and p.dim() == 2
        assert (group["weight_decay"], group["lr"]) == (0.1 if p.dim() == 2 else 0.0, 0.02 if in_block else 3e-3), name
        assert ("matrices" in group) == (kind == "muon" and in_block), name


@pytest.mark.parametrize(
    ("kind", "moments"), [("adamw", "fp32"), ("adamw", "8bit"), pytest.param("muon", "fp32", marks=needs_muon)]
)
def test_moments_made_before_the_first_step_are_those_it_would_make(kind: str, moments: str) -> None:
    states = []
    for early in (True, False):
        model = model_with_gradients()
        made = make_optimizer(model, kind, **RECIPE, moments=moments)
        if early:
            made.make_state()
            assert all(not t.any() for p in model.parameters() for t in made.state[p].values())
        made.step()
        states.append([(name, p, *made.state[p].items()) for name, p in model.named_parameters()])
    for (name, p, *state), (_, q, *other) in zip(*states, strict=True):
        assert torch.equal(p, q), name
        assert [key for key, _ in state] == [key for key, _ in other], name
        assert all(torch.equal(t, u) for (_, t), (_, u) in zip(state, other, strict=True)), name


@needs_muon
def test_muon_takes_a_step_for_each_matrix_as_pytorch_does_for_the_transposed_one() -> None:
    model = model_with_gradients()
    block = model.h[1]
    weights = {"c_attn": block.attn.c_attn.weight, "c_fc": block.mlp.c_fc.weight, "c_proj": block.mlp.c_proj.weight}
    pieces = {}
    for name, weight in weights.items():
        for i, piece in enumerate(weight.detach().chunk(3 if name == "c_attn" else 1, dim=1)):
            pieces[name, i] = nn.Parameter(piece.T.clone())
    ours, theirs = make_optimizer(model, "muon", **RECIPE), torch.optim.Muon(pieces.values(), lr=0.02, weight_decay=0.1)
    for _ in range(2):  # the second step has a momentum
        for name, weight in weights.items():
            for i, grad in enumerate(weight.grad.chunk(3 if name == "c_attn" else 1, dim=1)):
                pieces[name, i].grad = grad.T.clone()
        ours.step()
        theirs.step()
    for name, weight in weights.items():
        expected = torch.cat([p.T for (of, _), p in pieces.items() if of == name], dim=1)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=2e-3 * 0.02)
    assert set(ours.state[weights["c_attn"]]) == {"momentum_buffer"}


@needs_muon
@pytest.mark.parametrize(("unit", "default"), [("avx512_bf16", "muon"), (None, "adamw")])
def test_muon_is_the_default_where_bfloat16_is_fast(monkeypatch, unit: str | None, default: str) -> None:
    monkeypatch.setattr(optimizer, "bfloat16_unit", lambda: unit)
    assert TrainConfig(device="cpu").resolved().optimizer == default
    assert TrainConfig(device="cpu", optimizer="muon").resolved().optimizer == "muon"
    assert TrainConfig(device="cpu", parallel="fsdp").resolved().optimizer == "adamw"


def test_without_muon_it_is_refused_by_name_and_never_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "muon", lambda: None)
    assert TrainConfig().resolved().optimizer == "adamw"
    with pytest.raises(ValueError, match=r"has no Muon where torch 2.10 to 2.14 have it; take --optimizer adamw"):
        make_optimizer(model_with_gradients(), "muon", **RECIPE)


def test_recipes_follow_the_model_and_what_is_given() -> None:
    def recipe(**settings: object) -> tuple[object, ...]:
        found = train.TrainConfig(**settings).resolved()  # type: ignore[arg-type]
        return found.lr, found.embedding_lr, found.warmup, found.weight_decay

    assert recipe(optimizer="adamw", max_steps=300) == (1e-3, 3e-3, 30, 0.1)
    assert recipe(optimizer="adamw", n_embd=384) == (0.192 / 384, 3e-3, 30, 0.1)
    assert recipe(optimizer="adamw", n_embd=768) == (1.77e-4, 1.5e-3, 30, 0.1)
    assert recipe(optimizer="adamw", n_embd=768, lr=1.2345e-4) == (1.2345e-4, 1.2345e-4, 30, 0.1)
    assert [recipe(optimizer="adamw", max_steps=n)[2] for n in (1, 3, 40, 100, 300, 1000)] == [1, 1, 12, 30, 30, 100]
    assert [recipe(optimizer="muon", max_steps=n)[2] for n in (1, 3, 40, 100, 300, 1000)] == [1, 1, 4, 10, 30, 100]
    # A quarter of the tokens in a step, half of the rate; more than were measured, no more.
    assert recipe(optimizer="adamw", batch=2) == recipe(optimizer="adamw", length=64) == (5e-4, 3e-3, 30, 0.1)
    assert (
        recipe(optimizer="adamw", batch=2, accumulate=4) == recipe(optimizer="adamw", batch=64) == (1e-3, 3e-3, 30, 0.1)
    )
    assert recipe(optimizer="adamw", lr=5e-4) == (5e-4, 5e-4, 30, 0.1)
    assert recipe(optimizer="muon", n_embd=192, weight_decay=0.0) == (0.02, 6e-3, 15, 0.0)
    assert recipe(optimizer="muon", n_embd=768, weight_decay=0.0) == (0.01, 6e-3, 15, 0.0)
    assert recipe(optimizer="muon", n_embd=128, weight_decay=0.0) == (0.0245, 6e-3, 15, 0.0)
    assert recipe(init="gpt2") == (1e-4, 1e-4, 10, 0.0)
    assert recipe(init="gpt2", lr=1e-5) == (1e-5, 1e-5, 10, 0.0)
    assert recipe(init="gpt2", optimizer="muon") == (5e-3, 1e-4, 10, 0.0)
    assert recipe(init="gpt2", optimizer="muon", lr=0.01) == (0.01, 1e-4, 10, 0.0)
