"""The optimizer inside the backward pass: the same weights to the bit, gradients one by one, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import arguments, curve, launch, needs_fsdp, outcome, run_here
from torch import nn
from torch.utils.hooks import RemovableHandle

from minigpt2 import GPT2, GPT2Config
from minigpt2.training.optimizer import AdamW, Optimizers, make_optimizer

RECIPE = {"lr": 0.02, "embedding_lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
KINDS = ["adamw", pytest.param("muon", marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="no Muon"))]
PLAIN = {"max_steps": 10, "snapshot_every": 4, "warmup": 3}
RUN = PLAIN | {"optimizer_in_backward": True}


def make_model(**settings: object) -> GPT2:
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 32, "vocab_size": 31, "n_positions": 8}
    config = GPT2Config().replace(**shape, tie_word_embeddings=settings.pop("tied", True))
    return GPT2(config, **settings)  # type: ignore[arg-type]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def steps(model: GPT2, optimizer: Optimizers, n: int = 3) -> list[float]:
    norms = []
    torch.manual_seed(1)  # of dropout
    for step in range(n):
        model.loss(*batch(step)).backward()
        norms.append(optimizer.clip_gradients().item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def test_adamw_is_that_of_pytorch_to_the_bit() -> None:
    ours, theirs = make_model(), make_model()
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    a = AdamW([{"params": list(ours.parameters()), "lr": 0.01}], **settings)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=True, **settings)
    for step in range(3):
        for model, optimizer in ((ours, a), (theirs, b)):
            torch.manual_seed(step)
            model.loss(*batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        assert all(torch.equal(t, b.state[q][key]) for key, t in a.state[p].items())


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_moments_in_less_do_not_depend_on_when_a_step_is_taken(moments: str) -> None:
    apart, inside = make_model(checkpoint_every=1), make_model(checkpoint_every=1)
    ordinary, in_backward = (
        make_optimizer(model, "adamw", **RECIPE, moments=moments, in_backward=model is inside)
        for model in (apart, inside)
    )
    assert steps(apart, ordinary) == steps(inside, in_backward)
    assert all(torch.equal(p, q) for p, q in zip(apart.parameters(), inside.parameters(), strict=True))
    exact = make_model()
    steps(exact, make_optimizer(exact, "adamw", **RECIPE))
    for (name, p), q in zip(apart.named_parameters(), exact.parameters(), strict=True):
        largest = 6e-3 if name.startswith("w") or p.dim() < 2 else 0.04
        torch.testing.assert_close(p, q, rtol=0, atol=largest)
        kept = ordinary.state[p]
        wanted = {2: {"bf16": torch.bfloat16, "8bit": torch.uint8}[moments], 1: torch.float32}[p.dim()]
        assert kept["exp_avg"].dtype == kept["exp_avg_sq"].dtype == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("every", "recompute"), [(0, "block"), (1, "block"), (2, "keep-attention"), (1, "pointwise")])
def test_the_same_weights_to_the_bit(kind: str, tied: bool, every: int, recompute: str) -> None:
    apart, inside = (make_model(checkpoint_every=every, recompute=recompute, tied=tied) for _ in range(2))
    ordinary, in_backward = (
        make_optimizer(apart, kind, **RECIPE),
        make_optimizer(inside, kind, **RECIPE, in_backward=True),
    )
    assert steps(apart, ordinary) == steps(inside, in_backward)
    for p, q in zip(apart.parameters(), inside.parameters(), strict=True):
        assert torch.equal(p, q)
        state, other = ordinary.state[p], in_backward.state[q]
        assert state.keys() == other.keys()
        assert all(torch.equal(t, other[key]) for key, t in state.items())


def test_each_parameter_moves_once_and_no_two_gradients_are_there() -> None:
    """The tied embedding among them, whose gradient has two parts."""
    model = make_model(checkpoint_every=1)
    moved: list[str] = []
    parameters = dict(model.named_parameters())

    def hook(name: str) -> RemovableHandle:
        before = parameters[name].detach().clone()

        def arrived(p: nn.Parameter) -> None:  # before that of the optimizer
            assert [n for n, q in parameters.items() if q.grad is not None] == [name]
            assert torch.equal(p, before)
            moved.append(name)

        return parameters[name].register_post_accumulate_grad_hook(arrived)

    for name in parameters:
        hook(name)
    optimizer = make_optimizer(model, "adamw", **RECIPE, in_backward=True)
    model.loss(*batch(0)).backward()
    assert sorted(moved) == sorted(parameters)
    assert moved[-1] in ("wte.weight", "wpe.weight")
    assert all(p.grad is None for p in parameters.values())
    assert optimizer.moved == len(parameters)


def test_the_clip_is_for_each_parameter_by_itself() -> None:
    """As if its gradient had been clipped alone; and where no gradient is that large, as without."""
    apart, inside, loose = make_model(), make_model(), make_model()
    gradients = []
    for model in (apart, inside, loose):
        torch.manual_seed(0)
        clip = {apart: 0.0, inside: 0.05, loose: 1e3}[model]
        optimizer = make_optimizer(model, "adamw", **RECIPE, in_backward=model is not apart, clip=clip)
        model.loss(*batch(0)).backward()
        if model is apart:
            gradients = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
            for p in model.parameters():
                nn.utils.clip_grad_norm_([p], 0.05)
        optimizer.step()
        if model is inside:
            assert optimizer.clip_gradients().item() == pytest.approx(sum(g * g for g in gradients) ** 0.5)
    assert min(gradients) < 0.05 < max(gradients)
    assert all(torch.equal(p, q) for p, q in zip(apart.parameters(), inside.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(loose.parameters(), inside.parameters(), strict=True))


def test_from_a_gradient_that_is_not_finite_on_nothing_moves() -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, "adamw", **RECIPE, in_backward=True)
    model.h[1].mlp.c_proj.bias.register_hook(lambda grad: grad * torch.inf)
    model.loss(*batch(0)).backward()
    assert not optimizer.clip_gradients().isfinite()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == optimizer.moved
    assert "h.2.mlp.c_fc.weight" in moved
    assert not [name for name in moved if name.startswith(("h.0", "h.1.mlp.c_proj.bias", "h.1.attn", "wte", "wpe"))]
    optimizer.zero_grad()
    assert optimizer.moved == 0


@pytest.fixture(scope="module")
def ordinary(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose optimizer steps after the backward pass."""
    out = tmp_path_factory.mktemp("ordinary") / "run"
    run_here(*inputs, *arguments(PLAIN | {"clip": 0}), "--out", str(out))
    return out


def test_a_run_is_the_same_and_so_are_its_snapshots(run, ordinary: Path, at_step, tmp_path: Path) -> None:
    """Losses, norms and weights; a snapshot of either goes on in the other."""
    run(tmp_path / "whole", **RUN, clip=0)
    assert outcome(tmp_path / "whole") == outcome(ordinary)

    def crash(_: object) -> None:
        raise OSError("pulled the plug")

    at_step(7, crash)
    run(tmp_path / "resumed", **RUN | {"clip": 0}, status=1)
    run(tmp_path / "resumed", resume=True)
    assert outcome(tmp_path / "resumed") == outcome(ordinary)


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_a_run_with_moments_in_less_resumes_to_the_bit(run, at_step, tmp_path: Path, moments: str) -> None:
    """Also where the steps are taken elsewhere; and it learns as much."""
    run(tmp_path / "whole", **RUN, moments=moments, clip=0)

    def crash(_: object) -> None:
        raise OSError("pulled the plug")

    at_step(7, crash)
    run(tmp_path / "resumed", **PLAIN, moments=moments, clip=0, status=1)
    run(tmp_path / "resumed", resume=True, optimizer_in_backward=True)
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")
    said = run(tmp_path / "resumed", resume=True, moments="fp32", max_steps=12, status=2)
    assert f"--moments fp32 cannot change in a run, which has {moments}" in said


def test_moments_in_other_codes_are_refused(run, tmp_path: Path, monkeypatch) -> None:
    """And only by runs that have codes."""
    for moments in ("8bit", "bf16"):
        out = tmp_path / moments
        run(out, **RUN, moments=moments)
        with monkeypatch.context() as patch:
            patch.setattr("minigpt2.training.state.CODES", "others")
            said = run(out, resume=True, max_steps=12, status=2 if moments == "8bit" else 0)
        assert ("has moments in other codes" in said) == (moments == "8bit")


def test_moments_in_less_are_refused_with_muon(run, tmp_path: Path) -> None:
    assert "--moments 8bit is for --optimizer adamw" in run(tmp_path, moments="8bit", optimizer="muon", status=2)


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_two_processes_with_fsdp(inputs: list[str], tmp_path: Path, moments: str) -> None:
    needs_fsdp()
    run_here(*inputs, *arguments(RUN | {"clip": 0, "moments": moments}), "--out", str(tmp_path / "single"))
    ordinary = tmp_path / "single"
    settings = RUN | {"clip": 0, "parallel": "fsdp", "moments": moments}
    launch(*inputs, *arguments(settings), "--out", str(tmp_path / "run"), processes=2)
    # A gradient that is off by a rounding makes one moment in many another code.
    loss, weight = (1e-5, 1e-4) if moments == "fp32" else (1e-3, 1e-2)
    for a, b in zip(curve(tmp_path / "run"), curve(ordinary), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=loss)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=100 * loss)
    weights, reference = (load_file(out / "model.safetensors") for out in (tmp_path / "run", ordinary))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-3, atol=weight)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"accumulate": 2}, "--accumulate 2"),
        ({"compile": True}, "--compile"),
        ({"precision": "fp16"}, "--precision fp16"),
    ],
)
def test_what_it_refuses(run, tmp_path: Path, settings: dict[str, object], named: str) -> None:
    said = run(tmp_path / "run", **settings, optimizer_in_backward=True, status=2)
    assert f"--optimizer-in-backward cannot be combined with {named}" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_it_refuses_ddp(inputs: list[str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="cannot be combined with --parallel ddp"):
        launch(*inputs, *arguments(RUN), "--out", str(tmp_path / "run"), processes=2)


def test_a_run_stops_at_a_gradient_that_is_not_finite(run, at_step, tmp_path: Path) -> None:
    """And names the snapshot before it: of weights of which a part has moved there is none."""

    def spoil(trainer: object) -> None:
        trainer.model.h[0].mlp.c_proj.bias.register_hook(lambda grad: grad * torch.nan)  # type: ignore[attr-defined]

    at_step(6, spoil)
    said = run(tmp_path, **RUN, status=1)
    assert "parameters had moved by then, and the others have not" in said
    assert "there is a snapshot from before, of step 4" in said
    assert sorted(p.name for p in (tmp_path / "snapshots").iterdir()) == ["step-00000000", "step-00000004"]
