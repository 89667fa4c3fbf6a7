"""The benchmark of learning takes the steps of train.py, and transformers' model takes the same."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import arguments, make_inputs, rows, run_here

from minigpt2.bench import learning
from minigpt2.bench.learning import bench_learning

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "length": 16, "batch": 4}


class Here:
    """A pool of processes that runs in this one, which is quicker, without the arena, which would stay."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function, *given):
        self.given = function, given
        return self

    def result(self):
        function, given = self.given
        return function(*given)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(learning, "tune_allocator", lambda: "as it was")
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with init/, of a vocabulary of 97, and tokens/."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def test_its_losses_are_those_of_train(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"data": inputs / "tokens", "eval_every": 3, "seed": 1} | TINY
    run_here(*arguments(settings | {"out": tmp_path / "run", "max_steps": 8, "optimizer": "adamw"}))
    (curve,) = bench_learning(inputs / "tokens", steps=8, eval_every=3, seeds=(1,), optimizer=("adamw",), **TINY)
    steps = rows(tmp_path / "run")
    assert curve.loss == [row["loss"] for row in steps]
    validation = {row["step"]: row["val_loss"] for row in steps if "val_loss" in row}
    assert curve.validation == {0: steps[0]["val_loss_before"]} | validation
    assert curve.seconds == sorted(curve.seconds)
    printed = capsys.readouterr().out
    assert printed.startswith("bench learning: ")
    assert f"2 blocks of width 16, 4 x 16 tokens of {inputs / 'tokens'}, fp32, seeds 1\n" in printed
    assert "minigpt2, adamw 0.00212, embeddings 0.003" in printed


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_transformers_learns_the_same_from_the_same_weights(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    settings = {"init": str(inputs / "init"), "length": 16, "batch": 4, "lr": (1e-2,), "optimizer": (optimizer,)}
    ours, theirs = bench_learning(
        inputs / "tokens", steps=12, eval_every=4, compare="hf", out=tmp_path / "pictures", **settings
    )
    assert (ours.setting.library, theirs.setting.library) == ("minigpt2", "transformers")
    assert ours.setting._replace(library="transformers") == theirs.setting
    assert len(ours.loss) == len(theirs.loss) == 12
    assert sum(ours.loss[-4:]) < sum(ours.loss[:4])
    assert ours.loss != theirs.loss
    close = 2e-3 if optimizer == "muon" else 2e-4  # Muon multiplies in bfloat16
    torch.testing.assert_close(torch.tensor(ours.loss), torch.tensor(theirs.loss), rtol=0, atol=close)
    assert ours.validation == pytest.approx(theirs.validation, abs=close)
    assert "its loss differs from minigpt2's by at most" in capsys.readouterr().out
    for over in ("steps", "seconds"):
        assert (tmp_path / f"pictures-{over}.png").read_bytes().startswith(b"\x89PNG")


def test_every_rate_and_seed_is_run_and_a_program_may_read_it(inputs: Path, capsys) -> None:
    found = bench_learning(
        inputs / "tokens", steps=3, lr=(1e-3, 1e30), seeds=(0, 1), optimizer=("adamw",), json=True, **TINY
    )
    said = json.loads(capsys.readouterr().out)
    assert said["header"].startswith("bench learning: ")
    settings = [(run["setting"]["lr"], run["setting"]["embedding_lr"], run["seed"]) for run in said["runs"]]
    assert settings == [(1e-3, 1e-3, 0), (1e-3, 1e-3, 1), (1e30, 1e30, 0), (1e30, 1e30, 1)]
    assert [run["loss"] for run in said["runs"]] == [curve.loss for curve in found]
    assert [list(curve.validation.values())[-1] == math.inf for curve in found] == [False, False, True, True]
    assert [list(run["validation"].values())[-1] is None for run in said["runs"]] == [False, False, True, True]
    assert len({tuple(curve.loss) for curve in found[:2]}) == 2


def test_what_cannot_run_is_said_before_anything_runs(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "_train", None)
    with pytest.raises(ValueError, match="n_embd must be a multiple of n_head"):
        bench_learning(inputs / "tokens", **TINY | {"n_head": 3})
    with pytest.raises(ValueError, match="--max-steps must be >= 1, got 0"):
        bench_learning(inputs / "tokens", steps=0)
    with pytest.raises(ValueError, match="are too few: --batch 5000 --length 16 needs"):
        bench_learning(inputs / "tokens", **TINY | {"batch": 5000})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"--out: .*; pip install 'minigpt2\[plots\]'"):
        bench_learning(inputs / "tokens", out=Path("pictures"))
