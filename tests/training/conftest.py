"""Fixtures of the tests of training: the inputs of tiny runs, runs of train.py on them, and what happens on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import arguments, make_inputs, run_here

import train


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As tiny_runs.launch has it; and threads that wait for one another are slow where other processes compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run(inputs: list[str]) -> Callable[..., str]:
    """run(out, status=0, resume=False, **settings): tiny_runs.run_here, on the inputs or to continue."""

    def call(out: Path, *, status: int = 0, resume: bool = False, **settings: object) -> str:
        given = ["--resume"] if resume else inputs
        return run_here(*given, "--out", str(out), *arguments(settings), status=status)

    return call


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[train.Trainer], object]], None]:
    """at_step(step, action): before that step, action(trainer) is called, once."""
    advance, actions = train.Trainer.advance, {}

    def patched(trainer: train.Trainer) -> dict[str, object]:
        actions.pop(trainer.step + 1, lambda _: None)(trainer)
        return advance(trainer)

    monkeypatch.setattr(train.Trainer, "advance", patched)
    return actions.__setitem__
