"""With Muon a run keeps what it promises with AdamW."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import arguments, command, curve, environment, launch, outcome, run_here

import train

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")

MUON = {"optimizer": "muon", "lr": 0.02, "embedding_lr": 5e-3, "max_steps": 10, "warmup": 2, "snapshot_every": 5}
SETTINGS = MUON | {"dropout": 0.1, "accumulate": 2, "precision": "bf16"}


@pytest.fixture(scope="module")
def whole(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed, with all that may go wrong together: dropout, micro-batches, bfloat16."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_here(*inputs, *arguments(SETTINGS), "--out", str(out))
    return out


class Crash(Exception):
    pass


def crash(trainer: object) -> None:
    raise Crash


def test_it_learns_and_the_run_has_its_settings(whole: Path) -> None:
    rows = curve(whole)
    assert rows[-1]["val_loss"] < rows[0]["val_loss_before"] - 0.05
    saved = load_file(whole / "snapshots" / "step-00000010" / "optimizer.safetensors")
    kinds = {
        name.rpartition("/")[2] for name in saved if name.startswith("h.") and "weight" in name and "ln" not in name
    }
    assert kinds == {"momentum_buffer"}
    assert "wte.weight/exp_avg_sq" in saved


@pytest.mark.parametrize("notch", [(1, "block"), (2, "keep-attention"), (0, "pointwise")])
def test_every_notch_is_the_same_to_the_bit(run, whole: Path, tmp_path: Path, notch: tuple[int, str]) -> None:
    run(tmp_path, **SETTINGS | {"checkpoint_every": notch[0], "recompute": notch[1]})
    assert outcome(tmp_path) == outcome(whole)


def test_a_crash_and_a_resume_change_nothing(run, whole: Path, at_step, tmp_path: Path) -> None:
    at_step(8, crash)
    with pytest.raises(Crash):
        run(tmp_path, **SETTINGS)
    torch.manual_seed(99)
    run(tmp_path, resume=True)
    assert outcome(tmp_path) == outcome(whole)


def check_alike(out: Path, expected: Path, inputs: list[str]) -> None:
    """The same losses and weights but for rounding, which Muon does in bfloat16 five times over: what a matrix has
    learned differs by 4% of its norm where gradients differ by the rounding of float32."""
    for ours, theirs in zip(curve(out), curve(expected), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3)
    begun = Path(inputs[inputs.index("--init") + 1])
    weights, reference, before = (load_file(folder / "model.safetensors") for folder in (out, expected, begun))
    for name, tensor in weights.items():
        learned = reference[name] - before[name]
        assert (tensor - reference[name]).norm() < 0.1 * learned.norm(), name


def test_accumulation_gives_the_step_of_one_large_batch(run, inputs: list[str], tmp_path: Path) -> None:
    run(tmp_path / "one", batch=8, **MUON)
    run(tmp_path / "four", batch=2, accumulate=4, **MUON)
    check_alike(tmp_path / "four", tmp_path / "one", inputs)


@pytest.mark.slow
def test_ddp_equals_one_process(run, inputs: list[str], tmp_path: Path) -> None:
    settings = MUON | {"accumulate": 2}
    printed = launch(*inputs, *arguments(settings), "--out", str(tmp_path / "two"), processes=2)
    assert "cpu x 2 (ddp)" in printed
    run(tmp_path / "one", **settings)
    check_alike(tmp_path / "two", tmp_path / "one", inputs)


@pytest.mark.slow
def test_fsdp_is_refused_by_name(inputs: list[str], tmp_path: Path) -> None:
    settings = [*inputs, *arguments(MUON | {"parallel": "fsdp", "out": tmp_path / "run"})]
    done = subprocess.run(command(*settings, processes=1), env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    said = "--optimizer muon needs whole matrices, and fsdp shards them; take --parallel ddp, or adamw"
    assert said in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_step_that_is_not_finite_moves_nothing_if_skipped(run, at_step, tmp_path: Path) -> None:
    before: dict[str, torch.Tensor] = {}

    def state(trainer: train.Trainer) -> dict[str, torch.Tensor]:
        return {name: t.clone() for name, t in trainer.model.named_parameters()} | {
            f"{name}/momentum": trainer.optimizer.state[p]["momentum_buffer"].clone()
            for name, p in trainer.model.named_parameters()
            if "momentum_buffer" in trainer.optimizer.state[p]
        }

    def poison(trainer: train.Trainer) -> None:
        before.update(state(trainer))
        module = trainer.model.h[1].mlp.c_proj
        module.register_forward_hook(lambda module, args, output: output * float("nan"))

    def heal(trainer: train.Trainer) -> None:
        trainer.model.h[1].mlp.c_proj._forward_hooks.clear()
        after = state(trainer)
        assert len(after) > len(dict(trainer.model.named_parameters()))
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())

    at_step(4, poison)
    at_step(5, heal)
    assert "; step skipped" in run(tmp_path, on_nonfinite="skip", **MUON)
    assert [row["step"] for row in curve(tmp_path) if row.get("skipped")] == [4]


def test_a_step_that_is_not_finite_stops_the_run_before_it(run, whole: Path, at_step, tmp_path: Path) -> None:
    def poison(trainer: train.Trainer) -> None:
        trainer.model.h[1].mlp.c_proj.register_forward_hook(lambda module, args, output: output * float("nan"))

    at_step(7, poison)
    error = run(tmp_path, **SETTINGS, status=1)
    assert "step 7: the loss is nan" in error
    assert "--lr 0.002 --embedding-lr 0.0005" in error
    run(tmp_path, resume=True)
    assert outcome(tmp_path) == outcome(whole)
