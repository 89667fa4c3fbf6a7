"""A run that was interrupted equals the one that was not, bit for bit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from kill_and_resume import kill_and_resume, kill_at_every_instant, text_settings
from tiny_runs import arguments, curve, outcome, run_here

import train

SETTINGS = {"dropout": 0.1, "accumulate": 2, "snapshot_every": 5, "max_steps": 20, "warmup": 3}


@pytest.fixture(scope="module")
def whole(inputs: list[str], tmp_path_factory: pytest.TempPathFactory):
    """The outcome of the run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_here(*inputs, *arguments(SETTINGS), "--out", str(out))
    return outcome(out)


@pytest.fixture
def run(run):
    return lambda out, resume=False, **changes: run(out, resume=resume, **(changes if resume else SETTINGS | changes))


class Crash(Exception):
    pass


def crash(trainer: object) -> None:
    raise Crash


@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
def test_a_crash_and_a_resume_change_nothing(run, whole, at_step, tmp_path: Path, checkpoint_every: int) -> None:
    at_step(13, crash)
    with pytest.raises(Crash):
        run(tmp_path, checkpoint_every=checkpoint_every)
    assert len(curve(tmp_path)) == 12
    torch.manual_seed(99)
    run(tmp_path, resume=True)
    assert outcome(tmp_path) == whole


def test_recomputation_may_change_on_the_way(run, whole, at_step, tmp_path: Path) -> None:
    at_step(8, crash)
    with pytest.raises(Crash):
        run(tmp_path, checkpoint_every=1)
    run(tmp_path, resume=True, checkpoint_every=0)
    assert outcome(tmp_path) == whole


def test_fp16_keeps_its_scale(run, at_step, tmp_path: Path) -> None:
    run(tmp_path / "whole", precision="fp16", max_steps=10)
    at_step(8, crash)
    with pytest.raises(Crash):
        run(tmp_path / "broken", precision="fp16", max_steps=10)
    run(tmp_path / "broken", resume=True)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    state = json.loads((tmp_path / "broken" / "snapshots" / "step-00000010" / "state.json").read_text())
    assert state["scaler"]["_growth_tracker"] == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_finishes_the_step(run, whole, at_step, tmp_path: Path, number: int) -> None:
    at_step(7, lambda trainer: os.kill(os.getpid(), number))
    before = signal.signal(number, signal.SIG_DFL)  # whoever started pytest may have had some ignored, as nohup does
    try:
        assert "finishing this step" in run(tmp_path, status=128 + number)
    finally:
        signal.signal(number, before)
    assert len(curve(tmp_path)) == 7
    assert (tmp_path / "snapshots" / "step-00000007").is_dir()
    assert "step-00000007" in run(tmp_path, resume=True)
    assert outcome(tmp_path) == whole


@pytest.mark.slow
def test_sigkill(inputs: list[str], tmp_path: Path) -> None:
    settings = [*inputs, *arguments(SETTINGS | {"snapshot_every": 1, "max_steps": 40})]
    kill_and_resume(settings, tmp_path, kills=2, seed=3)


@pytest.mark.slow
def test_sigkill_from_the_first_instant_on(tmp_path: Path) -> None:
    kill_at_every_instant(text_settings(tmp_path, steps=4), tmp_path, kills=3)


def test_a_damaged_snapshot_is_passed_over(run, whole, at_step, tmp_path: Path) -> None:
    at_step(13, crash)
    with pytest.raises(Crash):
        run(tmp_path)
    file = tmp_path / "snapshots" / "step-00000010" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    printed = run(tmp_path, resume=True)
    assert "passed over" in printed
    assert "step-00000010/optimizer.safetensors" in printed
    assert "resuming from" in printed
    assert "step-00000005" in printed
    assert outcome(tmp_path) == whole


def test_no_intact_snapshot_is_an_error(run, tmp_path: Path) -> None:
    run(tmp_path, max_steps=5)
    for path in (tmp_path / "snapshots").glob("*/state.json"):
        path.unlink()
    assert "no intact snapshot" in run(tmp_path, resume=True, status=2)


def test_an_older_snapshot_has_states_of_more_random_generators(run, whole, at_step, tmp_path: Path) -> None:
    """Those of Python and NumPy, of which nothing here draws."""
    at_step(13, crash)
    with pytest.raises(Crash):
        run(tmp_path)
    snapshot = tmp_path / "snapshots" / "step-00000010"
    state = json.loads((snapshot / "state.json").read_text())
    assert [set(states) for states in state["random"]] == [{"torch"}]
    state["random"][0] |= {"python": [3, [1, 2], None], "numpy": {"bit_generator": "MT19937"}}
    (snapshot / "state.json").write_text(json.dumps(state))
    manifest = json.loads((snapshot / "manifest.json").read_text())
    contents = (snapshot / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    (snapshot / "manifest.json").write_text(json.dumps(manifest))
    assert "step-00000010" in run(tmp_path, resume=True)
    assert outcome(tmp_path) == whole


def test_a_run_killed_before_its_first_snapshot_starts_again(run, whole, at_step, tmp_path: Path) -> None:
    at_step(4, crash)
    with pytest.raises(Crash):
        run(tmp_path, snapshot_every=0)
    assert not (tmp_path / "snapshots").exists()
    assert "from the beginning" in run(tmp_path, resume=True)
    assert outcome(tmp_path) == whole


def test_another_configuration(run, tmp_path: Path) -> None:
    run(tmp_path, max_steps=5)
    before = sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    error = run(tmp_path, resume=True, lr=1.0, length=16, status=2)
    assert "--length 16 cannot change in a run, which has 32: the order in which the run reads its tokens" in error
    assert f"--init {tmp_path} --out NEW" in error
    assert len([line for line in error.splitlines() if "train.py" in line]) == 1
    assert before == sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_another_corpus(run, inputs: list[str], tmp_path: Path) -> None:
    run(tmp_path, max_steps=5)
    tokens = Path(inputs[inputs.index("--data") + 1]) / "train.bin"
    contents = tokens.read_bytes()
    try:
        tokens.write_bytes(contents[:-2])
        assert "the training tokens are not the same" in run(tmp_path, resume=True, status=2)
    finally:
        tokens.write_bytes(contents)


def test_the_disk_fills_in_the_middle(run, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = train.snapshot.save_file

    def refuse(tensors, file):
        if file.parent.name == ".step-00000010.tmp":
            raise OSError(28, "No space left on device")
        return write(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(train.snapshot, "save_file", refuse)
        error = run(tmp_path, status=1)
    assert "No space left on device; the newest intact snapshot is" in error
    run(tmp_path, resume=True)
    assert outcome(tmp_path) == whole


def test_a_disk_that_cannot_sync(run, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    run(tmp_path)
    assert outcome(tmp_path) == whole


def test_the_best_weights_are_kept_apart(run, tmp_path: Path) -> None:
    """A learning rate that ruins the model after a few steps leaves the best where it was."""
    run(tmp_path, lr=0.5, warmup=19, eval_every=1)
    values = [row["val_loss"] for row in curve(tmp_path)]
    assert min(values) < min(values[-1], curve(tmp_path)[0]["val_loss_before"])
    state = json.loads((tmp_path / "snapshots" / "step-00000020" / "state.json").read_text())
    assert state["best_val_loss"] == min(values)
    _, last, best = outcome(tmp_path)
    assert last != best


def test_a_run_that_never_improves_has_no_best(run, tmp_path: Path) -> None:
    assert "no validation was better than the first" in run(tmp_path, lr=3.0, warmup=0, max_steps=6)
    assert not (tmp_path / "best").exists()
