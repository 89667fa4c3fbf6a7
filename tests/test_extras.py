"""Without the extras everything runs but what needs them, and that says so before it writes anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import arguments, make_inputs, rows

import train
from minigpt2 import __main__ as cli
from minigpt2.training.metrics import Metrics

PLOTS = "pip install 'minigpt2[plots]'"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """without(module, ...) has the modules missing."""

    def hide(*modules: str) -> None:
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)

    return hide


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """called(main, word, ...) -> (exit status, standard output, standard error)."""

    def call(main, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        return (main(), *capsys.readouterr())

    return call


def test_tensorboard_is_missing(without, called, tmp_path: Path) -> None:
    without("tensorboard", "torch.utils.tensorboard")
    status, out, err = called(train.main, "train.py", "--tensorboard", "--out", tmp_path / "run")
    assert (status, out) == (2, "")
    assert err.startswith("train.py: --tensorboard: ")
    assert err.endswith("; pip install 'minigpt2[tensorboard]'\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_all_that_is_missing_is_said_at_once(without, called, tmp_path: Path) -> None:
    without("tensorboard", "torch.utils.tensorboard", "wandb")
    status, out, err = called(train.main, "train.py", "--tensorboard", "--wandb", "--out", tmp_path / "run")
    assert (status, out) == (2, "")
    assert "; pip install 'minigpt2[tensorboard]'; --wandb: " in err
    assert err.endswith("; pip install 'minigpt2[wandb]'\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_not_the_package(without, called, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    status, _, err = called(train.main, "train.py", "--wandb", "--out", tmp_path / "run")
    assert status == 2
    assert err == "train.py: --wandb: wandb is a folder here, not the package; pip install 'minigpt2[wandb]'\n"


class FakeWandb:
    """What train.py calls of wandb, with a note of every call."""

    class Error(Exception): ...

    def __init__(self, error: str = "") -> None:
        self.error, self.runs, self.rows, self.codes = error, [], [], []

    def login(self) -> None:
        if self.error:
            raise self.Error(self.error)

    def init(self, **settings: Any) -> FakeWandb:
        self.runs.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch):
    """wandb(error) installs a FakeWandb, whose login fails with the error, if one is given."""
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)

    def install(error: str = "") -> FakeWandb:
        fake = FakeWandb(error)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def test_without_an_account_wandb_is_refused_before_anything_is_written(wandb, called, monkeypatch, tmp_path) -> None:
    wandb("No API key configured.")
    status, out, err = called(train.main, "train.py", "--wandb", "--out", tmp_path / "run")
    assert (status, out) == (2, "")
    assert err == "train.py: --wandb: No API key configured. WANDB_MODE=offline needs no account.\n"
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_rows_of_the_metrics_as_one_run_that_is_resumed(wandb, called, tmp_path: Path) -> None:
    fake = wandb()
    settings = arguments({"max_steps": 3, "eval_batches": 1, "wandb": True, "out": tmp_path / "run"})
    assert called(train.main, "train.py", *make_inputs(tmp_path), *settings, "--no-tune-allocator")[0] == 0
    assert fake.rows == rows(tmp_path / "run")
    with Metrics(tmp_path / "run", 3, {"wandb": True}):
        pass
    first, second = fake.runs
    assert (first["project"], first["name"], first["config"]["max_steps"]) == ("minigpt2", "run", 3)
    assert (first["id"], first["dir"]) == (second["id"], str(tmp_path / "run"))
    assert second["resume"] == "allow"
    assert fake.codes == [0, 0]


def test_tensorboard_gets_the_rows_of_the_metrics(called, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = [*make_inputs(tmp_path), "--no-tune-allocator", "--eval-batches", 1, "--tensorboard"]
    assert called(train.main, "train.py", *settings, "--max-steps", 3, "--out", tmp_path / "run")[0] == 0
    board = events.EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    losses = [(event.step, event.value) for event in board.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows(tmp_path / "run")]


@pytest.mark.parametrize("words", [("plan", "--plot"), ("bench", "memory", "--out")], ids=" ".join)
def test_plots_are_missing_where_one_is_asked_for(without, called, tmp_path: Path, words: tuple[str, ...]) -> None:
    without("matplotlib", "matplotlib.figure")
    status, out, err = called(cli.main, "minigpt2", *words, tmp_path / "dial.png")
    assert (status, out) == (2, "")
    assert err.startswith(f"minigpt2: {words[-1]}: ")
    assert err.endswith(f"; {PLOTS}\n")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_parity_without_transformers(without, called, hf_tiny: Path) -> None:
    without("transformers")
    status, out, err = called(cli.main, "minigpt2", "parity", hf_tiny)
    assert (status, out) == (2, "")
    assert err.startswith("minigpt2: minigpt2 parity: ")
    assert err.endswith("; pip install 'minigpt2[parity]'\n")
    assert err.count("\n") == 1


def test_a_run_without_plots_ends_well_and_says_how_to_get_its_picture(without, called, tmp_path: Path) -> None:
    inputs = [*make_inputs(tmp_path), "--no-tune-allocator", *arguments({"max_steps": 1, "eval_batches": 1})]
    without("matplotlib", "matplotlib.figure")
    status, out, _ = called(train.main, "train.py", *inputs, "--out", tmp_path / "plain")
    assert status == 0
    assert PLOTS in out
    assert not (tmp_path / "plain" / "loss.png").exists()


def test_a_run_with_plots_says_where_its_picture_is(called, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    inputs = [*make_inputs(tmp_path), "--no-tune-allocator", *arguments({"max_steps": 1, "eval_batches": 1})]
    out = tmp_path / "$a$ größer"  # which is no formula
    assert f"the loss curve is {out}/loss.png\n" in called(train.main, "train.py", *inputs, "--out", out)[1]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
