"""train.py as a user runs it: a run folder that loads everywhere, settings that act, errors that help."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt2 import GPT2

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--length", "16", "--batch", "4", "--warmup", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with something to learn: the same few lines in varying order."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    lines = ["the cat sat on the mat.", "a dog ran over the hill.", "she sells sea shells."]
    path.write_text("\n".join(lines[i * i % 7 % 3] for i in range(600)), encoding="utf-8")
    return path


LEARNING = ["--eval-every", 5, "--dropout", 0.1, "--lr", 0.02]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("run") / "a"
    result = run(*TINY, "--data", text, "--out", out, "--max-steps", 12, *LEARNING)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_metrics_have_one_object_a_step(finished: tuple[Path, str]) -> None:
    rows = metrics(finished[0])
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} <= set(row)
        assert row["tokens"] == row["step"] * 4 * 16
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10, 12]
    assert rows[0]["val_loss_before"] == pytest.approx(math.log(50257), rel=0.02)
    assert rows[-1]["val_loss"] < rows[0]["val_loss_before"] - 0.5  # it learns


def test_the_run_folder_loads_here_and_in_transformers(finished: tuple[Path, str]) -> None:
    transformers = pytest.importorskip("transformers")
    out, printed = finished
    reference = transformers.GPT2LMHeadModel.from_pretrained(out).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(GPT2.from_pretrained(out)(ids), reference(ids).logits)
    assert json.loads((out / "train_config.json").read_text())["max_steps"] == 12
    assert "a sample of its text" in printed
    command = [
        sys.executable,
        "-m",
        "minigpt2",
        "generate",
        "--model",
        out,
        "--prompt",
        "the cat",
        "--temperature",
        "0",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the cat")


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in metrics(out)]


def test_the_same_command_gives_the_same_losses_bit_for_bit(finished: tuple[Path, str], text: Path) -> None:
    again, recomputed, other = (finished[0].with_name(name) for name in "bcd")
    settings = [*TINY, "--data", text, "--max-steps", 12, *LEARNING]
    assert run(*settings, "--out", again).returncode == 0
    assert losses(again) == losses(finished[0])
    # Neither recomputation nor how often one evaluates changes anything.
    assert run(*settings, "--out", recomputed, "--checkpoint-every", 1, "--eval-every", 3).returncode == 0
    assert losses(recomputed) == losses(finished[0])
    assert run(*settings, "--out", other, "--seed", 1).returncode == 0
    assert losses(other) != losses(finished[0])


def test_fine_tuning_starts_from_the_weights(finished: tuple[Path, str], text: Path) -> None:
    out = finished[0].with_name("tuned")
    result = run("--init", finished[0], "--data", text, "--out", out, "--max-steps", 1, "--length", 16, "--batch", 4)
    assert result.returncode == 0, result.stderr
    assert metrics(out)[0]["val_loss_before"] == pytest.approx(metrics(finished[0])[-1]["val_loss"], abs=0.05)


def test_accumulation_gives_the_step_of_one_large_batch(text: Path, tmp_path: Path) -> None:
    common = [*TINY[:-4], "--warmup", 2, "--data", text, "--max-steps", 4]
    for name, batch, accumulate in (("one", 8, 1), ("four", 2, 4)):
        arguments = ["--batch", batch, "--accumulate", accumulate, "--out", tmp_path / name]
        result = run(*common, *arguments)
        assert result.returncode == 0, result.stderr
    one, four = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    for a, b in zip(one, four, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_memory_budget_chooses_the_fastest_notch_that_fits(text: Path, tmp_path: Path) -> None:
    result = run(*TINY, "--data", text, "--max-steps", 1, "--memory-budget", "100GiB", "--out", tmp_path / "roomy")
    assert result.returncode == 0, result.stderr
    assert "checkpoint_every=0, recompute='block'" in result.stdout
    config = train.TrainConfig(n_layer=4, n_head=2, n_embd=64, batch=64, length=64)
    free = train.make_model(config, torch.device("cpu"))
    found = train.memory.notches(free.config, 64, 64)
    budget = train.memory.resident_bytes() + (found[0].peak + found[-1].peak) // 2
    tight = train.make_model(train.dataclasses.replace(config, memory_budget=str(budget)), torch.device("cpu"))
    assert (tight.checkpoint_every, tight.recompute) != (0, "block")


def test_learning_rate_schedule() -> None:
    config = train.TrainConfig(lr=1.0, warmup=4, max_steps=24)
    rates = [train.learning_rate(step, config) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    middle = 0.1 + 0.45 * (1 + math.cos(math.pi * 10 / 19))
    assert rates[14] == pytest.approx(middle)


def test_decay_is_on_matrices_only() -> None:
    config = train.TrainConfig(n_layer=1, n_head=1, n_embd=8, length=8)
    model = train.make_model(config, torch.device("cpu"))
    decayed, free = train.make_optimizer(model, config).param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", 0], "--batch must be >= 1, got 0"),
        (["--dropout", 1.5, "--lr", -1], "--lr must be >= 0, got -1.0; --dropout must be in [0, 1), got 1.5"),
        (["--checkpoint-every", 3], "checkpoint_every must be an integer from 0 (off) to n_layer=2, got 3"),
        (["--n-head", 3], "n_embd must be a multiple of n_head"),
        (["--attention", "magic"], "attention backend must be one of"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--init", "nowhere"], "'nowhere' is neither an official name"),
        (["--memory-budget", "1MiB"], "nothing fits 1 MiB: the least is "),
        (["--memory-budget", "much"], "expected an amount of memory such as 4GiB"),
        (["--memory-budget", "4GiB", "--checkpoint-every", 1], "--memory-budget chooses --checkpoint-every"),
        (["--device", "abacus"], "--device abacus is not available"),
        (["--batch", 5000], "tokens are too few for one batch: 5000 x 16 needs 80001"),
        (["--no-such-setting", 1], "no-such-setting"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    arguments: list[object], message: str, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(*TINY, "--data", text, "--out", out, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_a_run_is_never_overwritten(finished: tuple[Path, str], text: Path) -> None:
    before = (finished[0] / "metrics.jsonl").read_bytes()
    result = run(*TINY, "--data", text, "--out", finished[0])
    assert result.returncode == 2
    assert "already holds a run" in result.stderr
    assert (finished[0] / "metrics.jsonl").read_bytes() == before
