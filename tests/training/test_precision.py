"""Accumulation, mixed precision, and the guards against numbers that are not finite."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import arguments, curve, rows, run_here
from torch import Tensor

import minigpt2.model
from minigpt2 import GPT2, GPT2Config
from minigpt2.training.guards import first_nonfinite
from minigpt2.training.parallel import LossSum, Processes
from minigpt2.training.precision import autocast, fastest_precision
from minigpt2.training.step import accumulate_gradients, mean_loss

CONFIG = GPT2Config(
    vocab_size=97, n_positions=16, n_layer=3, n_head=2, n_embd=16, bos_token_id=None, eos_token_id=None,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip


def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(CONFIG).train()


def batch(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(97, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:].clone()


def gradients(network: GPT2) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("n", [2, 4])
def test_accumulation_equals_one_large_batch(n: int) -> None:
    """Also where the micro-batches have different numbers of targets."""
    input_ids, targets = batch(4)
    targets[0, :] = -100
    targets[1, 3:] = -100
    whole, parts = model(), model()
    whole.loss(input_ids, targets).backward()
    expected = (targets != -100).sum().item()
    micro_batches = list(zip(input_ids.chunk(n), targets.chunk(n), strict=True))
    loss, count = accumulate_gradients(LossSum(parts), micro_batches, Processes())
    assert count == expected
    assert loss == pytest.approx(whole.loss(input_ids, targets).item(), rel=1e-6)
    for a, b in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_mean_of_means_would_not_do() -> None:
    """What accumulation must not be: the test above can tell the difference."""
    input_ids, targets = batch(4)
    targets[0, :] = -100
    targets[1, 3:] = -100
    network = model()
    means = [network.loss(x, y).item() for x, y in zip(input_ids.chunk(2), targets.chunk(2), strict=True)]
    assert sum(means) / 2 != pytest.approx(network.loss(input_ids, targets).item(), rel=1e-4)


def test_a_step_without_targets_has_no_gradient() -> None:
    input_ids, targets = batch(2)
    network = model()
    loss, _ = accumulate_gradients(LossSum(network), [(input_ids, targets.fill_(-100))], Processes())
    assert loss == 0
    assert all(not g.any() for g in gradients(network))


def test_validation_draws_no_random_numbers_and_drops_nothing() -> None:
    network = GPT2(CONFIG.replace(embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5)).train()
    state = torch.get_rng_state()
    values = {mean_loss(LossSum(network), [batch(3)], Processes(), "fp32") for _ in range(3)}
    assert len(values) == 1
    assert torch.equal(state, torch.get_rng_state())
    assert network.training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_and_gradients_stay_float32(precision: str) -> None:
    network = model()
    products: list[torch.dtype] = []
    network.h[0].mlp.c_fc.register_forward_hook(lambda module, args, output: products.append(output.dtype))
    loss, _ = accumulate_gradients(LossSum(network), [batch(2)], Processes(), precision)
    assert products == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert {p.dtype for p in network.parameters()} | {g.dtype for g in gradients(network)} == {torch.float32}
    assert loss == pytest.approx(model().loss(*batch(2)).item(), rel=1e-2)


@pytest.mark.parametrize("recompute", ["block", "keep-attention", "pointwise"])
def test_every_notch_is_the_same_to_the_bit_under_autocast(recompute: str) -> None:
    config = CONFIG.replace(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    found = []
    for k in (0, 1, 2):
        torch.manual_seed(0)
        network = GPT2(config, checkpoint_every=k, recompute=recompute).train()
        with autocast(torch.device("cpu"), "bf16"):
            loss = network.loss(*batch(2))
        loss.backward()
        found.append([loss, *gradients(network)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_autocast_keeps_no_cast_of_a_weight() -> None:
    network, kept = model(), []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(torch.device("cpu"), "bf16"):
        network.loss(*batch(2))
    weights = {p.shape for p in network.h.parameters() if p.dim() == 2}
    assert {t.dtype for t in kept if t.shape in weights} == {torch.float32}


def test_the_fastest_precision_is_what_the_processor_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        precision, reason = fastest_precision(torch.device("cpu"))
        assert precision == expected
        assert next(iter(capabilities), "no products of bfloat16") in reason
    assert fastest_precision(torch.device("mps"))[0] == "fp32"


LEARNING = {"max_steps": 200, "snapshot_every": 0, "eval_every": 200, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def reference(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The curve in float32."""
    out = tmp_path_factory.mktemp("reference")
    run_here(*inputs, "--out", str(out), *arguments(LEARNING))
    return curve(out)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_follows_float32(run, reference, tmp_path: Path, precision: str) -> None:
    run(tmp_path, precision=precision, **LEARNING)
    half = curve(tmp_path)
    assert reference[-1]["val_loss"] < reference[0]["val_loss_before"] - 1.5, "it learned"
    assert [row["loss"] for row in reference] != [row["loss"] for row in half]
    assert half[-1]["val_loss"] == pytest.approx(reference[-1]["val_loss"], rel=0.02)
    last = [sum(row["loss"] for row in rows[-20:]) / 20 for rows in (reference, half)]
    assert last[1] == pytest.approx(last[0], rel=0.02)


def test_overflow_in_fp16_skips_the_step_and_says_so(run, tmp_path: Path, monkeypatch) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**40))
    printed = run(tmp_path, precision="fp16", max_steps=30)
    assert "step 1: a gradient overflowed in fp16; step skipped, loss scale halved" in printed
    steps = curve(tmp_path)
    skipped = [row["step"] for row in steps if row.get("skipped")]
    assert skipped == list(range(1, len(skipped) + 1))
    assert 1 <= len(skipped) < 30
    assert steps[-1]["loss"] < steps[0]["loss"]


class Poison(torch.autograd.Function):
    """The identity, with a backward pass that is broken."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def poison(network: GPT2, how: str) -> None:
    """Make one module fail."""
    mlp = network.h[1].mlp
    if how == "forward":
        mlp.c_proj.register_forward_hook(lambda module, args, output: output * math.inf)
    elif how == "backward":
        forward = mlp.c_proj.forward
        mlp.c_proj.forward = lambda x: forward(Poison.apply(x))
    else:
        with torch.no_grad():
            mlp.c_proj.weight[0, 0] = math.nan


CULPRITS = [
    ("forward", "the output of h.1.mlp.c_proj"),
    ("backward", "the backward pass of h.1.mlp.c_proj"),
    ("weights", "a weight of h.1.mlp.c_proj"),
]


@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
@pytest.mark.parametrize(("how", "named"), CULPRITS)
def test_the_first_module_is_named(how: str, named: str, checkpoint_every: int) -> None:
    network = model()
    network.checkpoint_every = checkpoint_every
    poison(network, how)
    with first_nonfinite(network) as found:
        accumulate_gradients(LossSum(network), [batch(2)], Processes())
    assert found[0] == named


def test_a_fault_between_modules_is_that_of_the_one_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention operation is no module; its backward pass lies between those of c_proj and c_attn."""
    network = model()
    attention = minigpt2.model.attention

    def faulty(qkv: Tensor, *args: object, **kwargs: object) -> Tensor:
        return attention(Poison.apply(qkv), *args, **kwargs)

    monkeypatch.setattr(minigpt2.model, "attention", faulty)
    with first_nonfinite(network) as found:
        accumulate_gradients(LossSum(network), [batch(2)], Processes())
    assert found[0] == "the backward pass of h.2.attn"


def test_a_sound_model_is_not_blamed_and_the_hooks_go() -> None:
    network = model()
    before = copy.deepcopy(network)
    with first_nonfinite(network) as found:
        accumulate_gradients(LossSum(network), [batch(2)], Processes())
    assert found == []
    assert all(not m._forward_hooks and not m._backward_hooks for m in network.modules())
    accumulate_gradients(LossSum(before), [batch(2)], Processes())
    for a, b in zip(gradients(network), gradients(before), strict=True):
        assert torch.equal(a, b)


def heal(network: GPT2) -> None:
    """Undo `poison`, but for a weight."""
    c_proj = network.h[1].mlp.c_proj
    c_proj._forward_hooks.clear()
    c_proj.__dict__.pop("forward", None)


@pytest.mark.parametrize(("how", "named"), CULPRITS[:2])
def test_a_bad_step_stops_the_run_before_it(run, at_step, tmp_path: Path, how: str, named: str) -> None:
    common = {"max_steps": 12, "dropout": 0.1, "snapshot_every": 5, "accumulate": 2}
    run(tmp_path / "whole", **common)
    at_step(8, lambda trainer: poison(trainer.model, how))
    error = run(tmp_path / "bad", **common, status=1)
    assert "step 8: the loss is" in error
    assert f"{named} is the first that is not finite" in error
    assert "snapshot from before, of step 7" in error
    assert len(curve(tmp_path / "bad")) == 7
    run(tmp_path / "bad", resume=True)  # the fault is gone: the run is what it would have been
    assert curve(tmp_path / "bad") == curve(tmp_path / "whole")


def test_a_bad_step_is_skipped_if_asked(run, at_step, tmp_path: Path) -> None:
    at_step(4, lambda trainer: poison(trainer.model, "forward"))
    at_step(5, lambda trainer: heal(trainer.model))
    assert "; step skipped" in run(tmp_path, max_steps=8, on_nonfinite="skip")
    steps = curve(tmp_path)
    assert [row["step"] for row in steps if row.get("skipped")] == [4]
    assert steps[3]["loss"] is None, "JSON has no NaN"
    assert all(math.isfinite(row["loss"]) for row in steps if row["step"] != 4)


def test_metrics(run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, tensorboard=True, max_steps=3)
    for row in rows(tmp_path):
        assert {"loss", "lr", "grad_norm", "seconds", "tokens_per_second", "mfu", "peak_memory_gib"} <= row.keys()
        assert all(row[key] > 0 for key in ("grad_norm", "lr", "tokens_per_second", "mfu", "peak_memory_gib"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tb").iterdir())
