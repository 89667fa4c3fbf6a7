"""A run says when its gradients grow, and in the end whether it had too few steps or too many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import rows

from minigpt2.training.guards import Norms
from minigpt2.training.metrics import enough_steps, plot_losses

RATES = {"--lr": 0.02, "--embedding-lr": 6e-3}


def said(norms: list[float]) -> list[str]:
    watch = Norms()
    lines = [watch.warning({"step": step, "grad_norm": norm}, RATES) for step, norm in enumerate(norms, 1)]
    return [line for line in lines if line]


def test_a_norm_far_above_those_before_it_is_one_line() -> None:
    usual = [2.0, 1.0, 0.5] * 5
    assert said([*usual, 9.9]) == []
    assert said([*usual, 10.1, 400.0, 11.0]) == [
        "step 16: the norm of the gradient is 10.1, the median of those before it 1; if the loss does not come down "
        "again, lower --lr 0.02 and --embedding-lr 0.006"
    ]
    assert [line.split(":")[0] for line in said([*usual, 50.0, *[1.0] * 98, 60.0, 70.0])] == ["step 16", "step 116"]


def test_the_first_norms_and_those_that_are_not_finite_say_nothing() -> None:
    assert said([1.0] * 9 + [100.0]) == []
    assert said([1.0] * 20 + [float("inf"), float("nan"), 5.0]) == []


def test_a_run_says_it_once_and_goes_on(run, at_step, tmp_path: Path) -> None:
    def enlarge(trainer: object) -> None:
        with torch.no_grad():
            trainer.model.ln_f.weight.mul_(100)  # type: ignore[attr-defined]

    at_step(15, enlarge)
    printed = run(tmp_path, max_steps=20, clip=0.5)
    assert printed.count("the norm of the gradient is") == 1
    assert "step 15: the norm of the gradient is" in printed
    assert "lower --lr 0.005 and --embedding-lr 0.005" in printed
    for row in rows(tmp_path):
        assert row.get("clipped", False) == (row["grad_norm"] > 0.5)
    assert any(row.get("clipped") for row in rows(tmp_path))
    run(tmp_path / "unclipped", max_steps=2, clip=0)
    assert not any("clipped" in row for row in rows(tmp_path / "unclipped"))


def written(folder: Path, losses: dict[int, float]) -> Path:
    """A metrics file with these validation losses, by step; step 0 is before training."""
    folder.mkdir()
    lines = [{"step": step, "tokens": 8 * step, "loss": 5.0, "grad_norm": 1.0} for step in range(1, max(losses) + 1)]
    lines[0]["val_loss_before"] = losses.get(0)
    for step, loss in losses.items():
        if step:
            lines[step - 1]["val_loss"] = loss
    lines[1] |= {"grad_norm": None, "loss": None, "skipped": True}
    lines[2] |= {"clipped": True}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({0: 9.0, 5: 5.0, 10: 4.5, 15: 4.2, 20: 4.1}, "still fell by 0.10 in the last quarter: more steps would have"),
        ({0: 9.0, 5: 5.0, 10: 4.5, 15: 4.2, 20: 4.19}, None),
        ({0: 9.0, 5: 5.0, 10: 4.5, 15: 4.2, 20: 4.21}, None),
        (
            {0: 9.0, 5: 4.3, 10: 4.2, 15: 4.4, 20: 4.5},
            "best at step 10 and has risen by 0.30 since: fewer steps, --max",
        ),
        ({0: 4.0, 5: 4.3, 10: 4.2, 15: 4.4, 20: 4.5}, None),
        ({0: 9.0, 20: 4.2}, None),
        ({0: 9.0}, None),
    ],
)
def test_validations_say_whether_the_steps_were_enough(tmp_path: Path, losses: dict, message: str | None) -> None:
    if max(losses) == 0:
        losses = losses | {3: 9.0}
    found = enough_steps(written(tmp_path / "run", losses))
    assert found is None if message is None else message in str(found)


def test_a_run_without_metrics_says_nothing(tmp_path: Path) -> None:
    assert enough_steps(tmp_path) is None


def test_the_last_lines_of_a_run_say_it(run, tmp_path: Path) -> None:
    printed = run(tmp_path / "short", max_steps=20)
    assert "more steps would have helped; go on with --resume --max-steps 40" in printed


def test_the_picture_has_norms_and_skipped_steps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = written(tmp_path / "run", {0: 9.0, 5: 5.0, 10: 4.5})
    assert plot_losses(folder) == f"the loss curve is {folder}/loss.png"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
