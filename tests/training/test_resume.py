"""A run that was interrupted equals the one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from kill_and_resume import kill_and_resume
from tiny_runs import arguments, curve, make_inputs, outcome

import train

SETTINGS = {"dropout": 0.1, "accumulate": 2, "snapshot_every": 5, "max_steps": 20, "warmup": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run(inputs: list[str], monkeypatch: pytest.MonkeyPatch):
    """run(out, ...) calls train.main with the settings and returns its exit status."""

    def call(out: Path, resume: bool = False, **changes: object) -> int:
        argv = ["--resume"] if resume else [*inputs, *arguments(SETTINGS)]
        monkeypatch.setattr("sys.argv", ["train.py", *argv, "--out", str(out), *arguments(changes)])
        return train.main()

    return call


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch):
    """interrupt(step, action) calls action once, at the beginning of that step."""
    advance = train.Trainer.advance

    def arm(step: int, action) -> None:
        def patched(self):
            if self.step + 1 == step:
                monkeypatch.setattr(train.Trainer, "advance", advance)
                action(self)
            return advance(self)

        monkeypatch.setattr(train.Trainer, "advance", patched)

    return arm


class Crash(Exception):
    pass


def crash(trainer: object) -> None:
    raise Crash


@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
def test_a_crash_and_a_resume_change_nothing(run, interrupt, tmp_path: Path, checkpoint_every: int) -> None:
    assert run(tmp_path / "whole", checkpoint_every=checkpoint_every) == 0
    interrupt(13, crash)
    with pytest.raises(Crash):
        run(tmp_path / "broken", checkpoint_every=checkpoint_every)
    assert len(curve(tmp_path / "broken")) == 12
    torch.manual_seed(99)
    assert run(tmp_path / "broken", resume=True) == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_recomputation_may_change_on_the_way(run, interrupt, tmp_path: Path) -> None:
    assert run(tmp_path / "whole") == 0
    interrupt(8, crash)
    with pytest.raises(Crash):
        run(tmp_path / "broken", checkpoint_every=1)
    assert run(tmp_path / "broken", resume=True, checkpoint_every=0) == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_fp16_keeps_its_scale(run, interrupt, tmp_path: Path) -> None:
    assert run(tmp_path / "whole", precision="fp16", max_steps=10) == 0
    interrupt(8, crash)
    with pytest.raises(Crash):
        run(tmp_path / "broken", precision="fp16", max_steps=10)
    assert run(tmp_path / "broken", resume=True) == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    state = json.loads((tmp_path / "broken" / "snapshots" / "step-00000010" / "state.json").read_text())
    assert state["scaler"]["_growth_tracker"] == 10


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step(run, interrupt, tmp_path: Path, number: int, status: int, capsys) -> None:
    assert run(tmp_path / "whole") == 0
    interrupt(7, lambda trainer: os.kill(os.getpid(), number))
    assert run(tmp_path / "stopped") == status
    assert "stopped after step 7" in capsys.readouterr().out
    assert len(curve(tmp_path / "stopped")) == 7
    assert (tmp_path / "stopped" / "snapshots" / "step-00000007").is_dir()
    assert run(tmp_path / "stopped", resume=True) == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_sigkill(inputs: list[str], tmp_path: Path) -> None:
    settings = [*inputs, *arguments(SETTINGS | {"snapshot_every": 1, "max_steps": 60})]
    kill_and_resume(settings, tmp_path, kills=2, seed=3)


def test_a_damaged_snapshot_is_passed_over(run, interrupt, tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "whole") == 0
    interrupt(13, crash)
    with pytest.raises(Crash):
        run(tmp_path / "broken")
    file = tmp_path / "broken" / "snapshots" / "step-00000010" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run(tmp_path / "broken", resume=True) == 0
    printed = capsys.readouterr().out
    assert "passed over" in printed
    assert "step-00000010/optimizer.safetensors" in printed
    assert "resuming from" in printed
    assert "step-00000005" in printed
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_no_whole_snapshot_is_an_error(run, tmp_path: Path, capsys) -> None:
    assert run(tmp_path, max_steps=5) == 0
    for path in (tmp_path / "snapshots").glob("*/state.json"):
        path.unlink()
    assert run(tmp_path, resume=True) == 2
    assert "no whole snapshot" in capsys.readouterr().err


def test_a_run_killed_before_its_first_snapshot_starts_again(run, tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "whole", max_steps=5) == 0
    assert run(tmp_path / "early", max_steps=5, snapshot_every=0) == 0
    assert not (tmp_path / "early" / "snapshots").exists()
    assert run(tmp_path / "early", resume=True) == 0
    assert "from the beginning" in capsys.readouterr().out
    assert outcome(tmp_path / "early") == outcome(tmp_path / "whole")


def test_another_configuration(run, tmp_path: Path, capsys) -> None:
    assert run(tmp_path, max_steps=5) == 0
    before = sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert run(tmp_path, resume=True, lr=1.0, batch=8) == 2
    error = capsys.readouterr().err
    assert "another configuration: batch 4 there, 8 here; lr 0.005 there, 1.0 here" in error
    assert len([line for line in error.splitlines() if "train.py" in line]) == 1
    assert before == sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_another_corpus(run, inputs: list[str], tmp_path: Path, capsys) -> None:
    assert run(tmp_path, max_steps=5) == 0
    tokens = Path(inputs[inputs.index("--data") + 1]) / "train.bin"
    contents = tokens.read_bytes()
    try:
        tokens.write_bytes(contents[:-2])
        assert run(tmp_path, resume=True) == 2
    finally:
        tokens.write_bytes(contents)
    assert "the training tokens are not the same" in capsys.readouterr().err


def test_nothing_to_resume(run, tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "absent", resume=True) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()


def test_the_disk_fills_in_the_middle(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert run(tmp_path / "whole") == 0

    def full(step: int):
        write = train.snapshot.save_file

        def refuse(tensors, file):
            if file.parent.name == f".step-{step:08d}.tmp":
                raise OSError(28, "No space left on device")
            return write(tensors, file)

        return refuse

    with monkeypatch.context() as patch:
        patch.setattr(train.snapshot, "save_file", full(10))
        assert run(tmp_path / "full") == 1
    assert "No space left on device; the newest whole snapshot is" in capsys.readouterr().err
    assert run(tmp_path / "full", resume=True) == 0
    assert outcome(tmp_path / "full") == outcome(tmp_path / "whole")


def test_the_best_weights_are_kept_apart(run, tmp_path: Path) -> None:
    """A learning rate that ruins the model after a few steps leaves the best where it was."""
    assert run(tmp_path, lr=0.5, warmup=19, eval_every=1) == 0
    values = [row["val_loss"] for row in curve(tmp_path)]
    assert min(values) < min(values[-1], curve(tmp_path)[0]["val_loss_before"])
    state = json.loads((tmp_path / "snapshots" / "step-00000020" / "state.json").read_text())
    assert state["best_val_loss"] == min(values)
    _, last, best = outcome(tmp_path)
    assert last != best


def test_a_run_that_never_improves_has_no_best(run, tmp_path: Path, capsys) -> None:
    assert run(tmp_path, lr=3.0, warmup=0, max_steps=6) == 0
    assert not (tmp_path / "best").exists()
    assert "no validation was better than the first" in capsys.readouterr().out
