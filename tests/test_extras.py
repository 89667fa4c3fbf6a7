"""Without the extras everything runs but what needs them, and that says so before it writes anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_runs import arguments, make_inputs

import train
from minigpt2 import __main__ as cli

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
