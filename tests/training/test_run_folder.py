"""What people do with a run after it was started: extend it, move it, use it, begin it again, start it twice."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import arguments, curve, outcome, rows, run_here

import train
from minigpt2 import GPT2
from minigpt2.training import folder
from minigpt2.training.trainer import schedule

SETTINGS = {"snapshot_every": 2, "max_steps": 6, "eval_every": 2, "warmup": 2}


def settings_of(out: Path) -> dict[str, object]:
    return json.loads((out / "train_config.json").read_text())


@pytest.fixture
def stopped(run, at_step):
    """stopped(out): a run that a signal stopped after its third step."""

    def call(out: Path, **settings: object) -> Path:
        at_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        run(out, status=143, **SETTINGS | settings)
        return out

    return call


@pytest.fixture(scope="module")
def whole(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_here(*inputs, *arguments(SETTINGS), "--out", str(out))
    return out


def test_a_finished_run_is_extended(run, whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    assert f"{out} is finished, with 6 steps; a larger --max-steps than 6 goes on" in run(out, resume=True)
    assert "--max-steps must be at least 6" in run(out, resume=True, max_steps=5, status=2)
    assert "from step 6 on: --max-steps 10, before 6" in run(out, resume=True, max_steps=10)
    assert [row["step"] for row in rows(out)] == list(range(1, 11))
    assert curve(out)[:6] == curve(whole)
    assert [row["lr"] for row in rows(out)][6:] == [5e-3 * schedule(step, 2, 10) for step in range(6, 10)]
    stored = settings_of(out)
    assert (stored["max_steps"], stored["finished"]) == (10, 10)
    assert stored["changes"] == [{"step": 6, "max_steps": [6, 10]}]


def test_settings_change_on_the_way(run, stopped, tmp_path: Path) -> None:
    out = stopped(tmp_path / "run")
    new = {"eval_every": 1, "eval_batches": 3, "lr": 1e-3, "warmup": 5, "clip": 0.5, "weight_decay": 0.2}
    new |= {"dropout": 0.2, "accumulate": 2, "batch": 8, "precision": "bf16", "early_stop": 9, "max_steps": 7}
    printed = run(out, resume=True, **new)
    for name, value in new.items():
        assert f"from step 3 on: --{name.replace('_', '-')} {value}, before" in printed
    stored = settings_of(out)
    assert {name: stored[name] for name in new} == new
    assert {name: pair[1] for name, pair in stored["changes"][0].items() if name != "step"} == new
    assert [row["tokens"] for row in rows(out)] == [128, 256, 384, 896, 1408, 1920, 2432]


@pytest.mark.parametrize("precisions", [("fp32", "fp16"), ("fp16", "fp32")])
def test_the_precision_changes_with_or_without_a_loss_scale(run, stopped, tmp_path: Path, precisions) -> None:
    out = stopped(tmp_path / "run", precision=precisions[0])
    run(out, resume=True, precision=precisions[1])
    assert len(rows(out)) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 5}, "--seed 5 cannot change in a run, which has 0"),
        ({"n_layer": 4}, "--n-layer 4 cannot change in a run"),
        ({"init": "gpt2"}, "--init gpt2 cannot change in a run"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_change_is_refused(run, whole: Path, tmp_path: Path, settings, message: str) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    before = settings_of(out)
    assert message in run(out, resume=True, max_steps=8, status=2, **settings)
    assert settings_of(out) == before


def test_everything_moves(inputs: list[str], whole: Path, at_step, tmp_path: Path, monkeypatch) -> None:
    """Run, data and current directory; the folder of --init is gone."""
    given = dict(zip(inputs[::2], inputs[1::2], strict=True))
    (there := tmp_path / "there").mkdir()
    for name in ("--init", "--data"):
        shutil.copytree(given[name], there / name)
    monkeypatch.chdir(there)
    at_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    given |= {"--init": "./--init", "--data": "./--data", "--out": "run"}
    run_here(*(part for pair in given.items() for part in pair), *arguments(SETTINGS), status=143)
    monkeypatch.chdir(tmp_path)
    there.rename("here")
    shutil.rmtree("here/--init")
    shutil.copytree("here/run", "copy/run")
    run_here("--out", "here/run", "--resume")  # the data is beside it, as it was
    run_here("--out", "copy/run", "--resume", "--data", "here/--data")
    assert outcome(Path("here/run")) == outcome(Path("copy/run")) == outcome(whole)


def test_text_is_not_needed_any_more(at_step, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i * i % 97} of a text\n" for i in range(900)))
    small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "length": 16, "batch": 2, "eval_batches": 1, "data": text}
    small |= SETTINGS | {"device": "cpu"}
    run_here(*arguments(small | {"out": tmp_path / "whole"}))
    at_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    out = tmp_path / "run"
    run_here(*arguments(small | {"out": out}), status=143)
    again = ["--out", str(out), "--resume"]
    text.rename(tmp_path / "moved.txt")
    other = tmp_path / "other.txt"
    other.write_text((tmp_path / "moved.txt").read_text() * 2)
    assert "the training tokens are not the same" in run_here(*again, "--data", str(other), status=2)
    assert not list(out.glob("tokens-*"))
    run_here(*again, "--data", str(tmp_path / "moved.txt"))
    assert outcome(out) == outcome(tmp_path / "whole")
    assert "--data" in run_here(*again, "--data", str(other), "--new-data", "--max-steps", "9")
    state = json.loads((out / "snapshots" / "step-00000009" / "state.json").read_text())
    assert (state["data"]["epoch"], state["data"]["window"]) == (1, 6)
    run_here(*again, "--max-steps", "10")
    assert settings_of(out)["changes"][0]["data"][1] == str(other)


def test_data_that_grew(inputs: list[str], stopped, run, tmp_path: Path) -> None:
    data = shutil.copytree(inputs[inputs.index("--data") + 1], tmp_path / "tokens")
    out = stopped(tmp_path / "run", data=data)
    tokens = np.fromfile(data / "train.bin", dtype="<u2")
    np.tile(tokens, 2).tofile(data / "train.bin")
    error = run(out, resume=True, status=2)
    assert "the training tokens are not the same" in error
    assert "--new-data" in error
    run(out, resume=True, new_data=True)
    assert len(rows(out)) == 6


def test_a_run_is_used_before_it_has_ended(stopped, inputs: list[str], tmp_path: Path) -> None:
    out = stopped(tmp_path / "run")
    snapshot = out / "snapshots" / "step-00000003"
    with pytest.warns(UserWarning, match=r"run that has not ended; its weights here are .*step-00000003"):
        model = GPT2.from_pretrained(out)
    again = GPT2.from_pretrained(snapshot)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert GPT2.from_pretrained(out / "best").config == model.config
    settings = [*inputs, *arguments({"init": snapshot, "max_steps": 1, "out": tmp_path / "new"})]
    run_here(*settings)
    (snapshot / "weights.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step-00000002"):
        GPT2.from_pretrained(out)
    with pytest.raises(ValueError, match=r"weights.safetensors: 0 bytes"):
        GPT2.from_pretrained(snapshot)


def test_a_run_that_went_on_has_newer_weights(whole: Path, run, at_step, tmp_path: Path, recwarn) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    GPT2.from_pretrained(out)
    assert not recwarn.list
    at_step(8, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    run(out, resume=True, max_steps=10, status=143)
    with pytest.warns(UserWarning, match=r"step-00000008"):
        GPT2.from_pretrained(out)


def test_a_run_without_weights(stopped, tmp_path: Path) -> None:
    out = stopped(tmp_path / "run")
    shutil.rmtree(out / "snapshots")
    with pytest.warns(UserWarning, match=r"best validation"):
        GPT2.from_pretrained(out)
    shutil.rmtree(out / "best")
    with pytest.raises(ValueError, match=r"a run that has no weights yet"):
        GPT2.from_pretrained(out)


def test_the_command_after_a_nan_can_be_pasted(run, at_step, tmp_path: Path) -> None:
    out = tmp_path / "a run's folder"

    def poison(trainer: train.Trainer) -> None:
        trainer.model.wpe.weight.data[0] = float("nan")

    at_step(5, poison)
    error = run(out, status=1, **SETTINGS)
    given = shlex.split(error.strip().rpartition("lower rates: ")[2])
    assert given[-7:] == ["--out", str(out), "--resume", "--lr", "0.0005", "--embedding-lr", "0.0005"]
    assert "step-00000004" in run_here(*given[-7:])
    assert len(rows(out)) == 6


def test_resume_begins_a_run_that_does_not_exist(run, inputs: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*inputs, *arguments(SETTINGS), "--out", str(out), "--resume"]
    assert f"{out} holds no run yet: beginning one" in run_here(*command)
    assert outcome(out) == outcome(whole)
    assert "is finished" in run_here(*command)


def test_old_tokens_are_not_taken_for_another_text(tmp_path: Path) -> None:
    """A kill between the tokens and the settings; then another --data, and another --separator."""
    small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "length": 16, "batch": 2, "out": tmp_path / "run", "max_steps": 1}
    for name in ("a", "b"):
        (tmp_path / name).write_text("".join(f"{name} {i}\n" for i in range(900)))
    for settings in ({"data": tmp_path / "a"}, {"data": tmp_path / "b"}, {"data": tmp_path / "b", "separator": "9"}):
        for path in (tmp_path / "run").glob("*"):
            if path.name != "tokens":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        run_here(*arguments(small | settings | {"resume": True}))
        run_here(*arguments(small | settings | {"out": (fresh := tmp_path / f"fresh {len(list(tmp_path.iterdir()))}")}))
        assert outcome(tmp_path / "run") == outcome(fresh)


def test_weights_without_snapshots_are_not_begun_over(run, whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out / "snapshots")
    assert f"--init {out} --out NEW" in run(out, resume=True, max_steps=10, status=2)
    (out / "model.safetensors").unlink()
    assert f"--init {out}/best --out NEW" in run(out, resume=True, status=2)
    (out / "train_config.json").unlink()
    assert "holds a run but no train_config.json" in run(out, resume=True, status=2)
    assert "already holds a run" in run(out, status=2)


def test_the_second_process_is_refused(run, whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    with folder.claimed(out):
        assert f"another process trains in {out}" in run(out, resume=True, max_steps=10, status=2)
    run(out, resume=True, max_steps=7)


def test_runs_of_one_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder.time, "strftime", lambda _: "runs/now")
    with folder.claimed(None) as a, folder.claimed(None) as b, folder.claimed(None) as c:
        assert [path.name for path in (a, b, c)] == ["now", "now-2", "now-3"]
    assert list((tmp_path / "runs").iterdir()) == []  # no run was begun


def test_an_ignored_signal_stays_ignored(run, at_step, tmp_path: Path) -> None:
    """As nohup has SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGHUP))
        run(tmp_path / "run", **SETTINGS)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(rows(tmp_path / "run")) == 6


def test_damaged_metrics_are_read_past(run, stopped, tmp_path: Path) -> None:
    out = stopped(tmp_path / "run")
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(lines[0] + b"\0\0\xff\n" + b'{"step": 2, "lo\n' + b"7\n" + lines[2])
    run(out, resume=True)
    assert [row["step"] for row in rows(out)] == [1, 3, 4, 5, 6]


def test_early_stop(run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = SETTINGS | {"lr": 3.0, "warmup": 0, "eval_every": 1, "early_stop": 2, "max_steps": 20}
    assert "2 validations in a row were no better than the best" in run(out, **settings)
    n = len(rows(out))
    assert n < 20
    assert (out / "model.safetensors").exists()
    assert "a larger --early-stop than 2, or 0, goes on" in run(out, resume=True)
    run(out, resume=True, early_stop=0, max_steps=n + 1)
    assert len(rows(out)) == n + 1


def test_a_snapshot_of_another_order_of_data_is_refused(run, whole: Path, tmp_path: Path, monkeypatch) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr("minigpt2.training.state.ORDER", "another")
    assert "reads its data in another order" in run(out, resume=True, max_steps=10, status=2)


def test_a_run_that_was_killed_before_its_last_weights_ends(run, whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "model.safetensors").unlink()
    stored = settings_of(out) | {"finished": None}
    (out / "train_config.json").write_text(json.dumps(stored))
    run(out, resume=True)
    assert outcome(out) == outcome(whole)
