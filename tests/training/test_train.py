"""train.py as a user runs it: a run folder that loads everywhere, settings that act, errors that help."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import ROOT, arguments, curve, environment, rows, run_here

import train
from minigpt2 import GPT2, frontier
from minigpt2.__main__ import main
from minigpt2.device import resident_bytes
from minigpt2.training.parallel import Processes
from minigpt2.training.settings import command
from minigpt2.training.trainer import schedule

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "length": 16, "batch": 4, "warmup": 2}
LEARNING = {"max_steps": 12, "eval_every": 5, "dropout": 0.1, "lr": 0.02}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with something to learn: the same few lines in varying order."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    lines = ["the cat sat on the mat.", "a dog ran over the hill.", "she sells sea shells."]
    path.write_text("\n".join(lines[i * i % 7 % 3] for i in range(600)), encoding="utf-8")
    return path


@pytest.fixture
def fresh(text: Path):
    """fresh(out, status=0, **settings): train.py with a model and token files of its own; see tiny_runs.run_here."""

    def call(out: Path, status: int = 0, **settings: object) -> str:
        return run_here(*arguments(TINY | {"data": text, "out": out} | settings), status=status)

    return call


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run folder, and what was printed."""
    out = tmp_path_factory.mktemp("run") / "a"
    return out, run_here(*arguments(TINY | LEARNING | {"data": text, "out": out}))


def test_metrics_have_one_object_a_step(finished: tuple[Path, str]) -> None:
    steps = rows(finished[0])
    assert [row["step"] for row in steps] == list(range(1, 13))
    for row in steps:
        assert {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} <= set(row)
        assert row["tokens"] == row["step"] * 4 * 16
    assert [row["step"] for row in steps if "val_loss" in row] == [5, 10, 12]
    assert steps[0]["val_loss_before"] == pytest.approx(math.log(50257), rel=0.02)
    assert steps[-1]["val_loss"] < steps[0]["val_loss_before"] - 0.5  # it learns


def test_the_run_folder_loads_here_and_in_transformers(finished: tuple[Path, str], monkeypatch, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    out, printed = finished
    reference = transformers.GPT2LMHeadModel.from_pretrained(out).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(GPT2.from_pretrained(out)(ids), reference(ids).logits)
    assert json.loads((out / "train_config.json").read_text())["max_steps"] == 12
    assert "a sample of its text" in printed
    words = ["generate", *arguments({"model": out, "prompt": "the cat", "temperature": 0, "max_new_tokens": 5})]
    monkeypatch.setattr(sys, "argv", ["minigpt2", *words])
    assert main() == 0
    assert capsys.readouterr().out.startswith("the cat")


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]


def test_the_same_settings_give_the_same_losses_bit_for_bit(finished: tuple[Path, str], fresh, tmp_path: Path) -> None:
    fresh(tmp_path / "again", **LEARNING)
    assert curve(tmp_path / "again") == curve(finished[0])
    # Neither recomputation nor how often one evaluates changes anything.
    fresh(tmp_path / "recomputed", **LEARNING | {"checkpoint_every": 1, "eval_every": 3})
    assert losses(tmp_path / "recomputed") == losses(finished[0])
    fresh(tmp_path / "other", **LEARNING, seed=1)
    assert losses(tmp_path / "other") != losses(finished[0])


def test_fine_tuning_starts_from_the_weights(finished: tuple[Path, str], text: Path, tmp_path: Path) -> None:
    settings = {"init": finished[0], "max_steps": 1, "data": text, "batch": 4}
    printed = run_here(*arguments(settings | {"out": tmp_path / "tuned"}))
    assert "--dropout that of the weights, --length 16, --optimizer adamw, --lr 0.0001" in printed
    assert "leave out --n-layer" in run_here(*arguments(settings | {"out": tmp_path / "a", "n_layer": 2}), status=2)
    before, after = rows(tmp_path / "tuned")[0]["val_loss_before"], rows(finished[0])[-1]["val_loss"]
    assert before == pytest.approx(after, abs=0.05)


@pytest.mark.parametrize(("optimizer", "loss", "norm"), [("adamw", 1e-5, 1e-4), ("muon", 1e-4, 5e-3)])
def test_accumulation_gives_the_step_of_one_large_batch(
    optimizer: str, loss: float, norm: float, fresh, tmp_path: Path
) -> None:
    """Up to the order of sums; after the first step Muon, which multiplies in bfloat16, makes more of it."""
    if not hasattr(torch.optim, "Muon") and optimizer == "muon":
        pytest.skip("this PyTorch has no Muon")
    fresh(tmp_path / "one", batch=8, max_steps=4, optimizer=optimizer)
    fresh(tmp_path / "four", batch=2, accumulate=4, max_steps=4, optimizer=optimizer)
    pairs = list(zip(rows(tmp_path / "one"), rows(tmp_path / "four"), strict=True))
    assert all(a["tokens"] == b["tokens"] for a, b in pairs)
    for n, (a, b) in enumerate(pairs):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss if n else 1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=norm if n else 1e-4)


def test_a_memory_budget_chooses_the_fastest_notch_that_fits(fresh, tmp_path: Path) -> None:
    assert "checkpoint_every=0, recompute='block'" in fresh(tmp_path, max_steps=1, memory_budget="100GiB")
    config = train.TrainConfig(n_layer=4, n_head=2, n_embd=64, batch=64, length=512).resolved()
    free, _ = train.make_model(config, Processes())
    found = frontier.notches(free.config, 64, 512)
    budget = resident_bytes() + (found[0].peak + found[-1].peak) // 2

    def choice(**settings: object) -> tuple[GPT2, train.TrainConfig]:
        return train.make_model(dataclasses.replace(config, memory_budget=str(budget), **settings), Processes())

    tight, chosen = choice(optimizer="muon", accumulate=2)
    assert (tight.checkpoint_every, tight.recompute) != (0, "block")
    assert not chosen.optimizer_in_backward
    assert choice(optimizer_in_backward=True)[1].optimizer_in_backward


@pytest.mark.slow
def test_nothing_needs_a_module_that_only_unix_has(text: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules.update(resource=None, fcntl=None); import train; sys.exit(train.main())"
    settings = arguments(TINY | {"data": text, "out": tmp_path / "out", "max_steps": 1})
    nothing_compiled = environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code, *settings]
    result = subprocess.run(command, env=nothing_compiled, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "out")[0]["peak_memory_gib"] > 0.05


def test_learning_rate_schedule() -> None:
    rates = [schedule(step, warmup=4, max_steps=24) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    middle = 0.1 + 0.45 * (1 + math.cos(math.pi * 10 / 19))
    assert rates[14] == pytest.approx(middle)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "--batch must be >= 1, got 0"),
        ({"dropout": 1.5, "lr": -1}, "--lr must be >= 0, got -1.0; --dropout must be in [0, 1), got 1.5"),
        ({"checkpoint_every": 3}, "checkpoint_every must be an integer from 0 (off) to n_layer=2, got 3"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head"),
        ({"attention": "magic"}, "attention backend must be one of"),
        ({"data": "nowhere.txt"}, "nowhere.txt: no such file or folder"),
        ({"init": "nowhere"}, "--init brings its own shape; leave out --n-layer, --n-head, --n-embd"),
        ({"new_data": True}, "--new-data is for --resume"),
        ({"memory_budget": "1MiB"}, "nothing fits 1MiB: the least is "),
        ({"memory_budget": "much"}, "expected an amount of memory such as 4GiB"),
        ({"memory_budget": "4GiB", "checkpoint_every": 1}, "--memory-budget chooses --checkpoint-every"),
        ({"device": "abacus"}, "--device abacus is not available"),
        ({"batch": 5000}, "tokens are too few: --batch 5000 --length 16 needs 80,001 and 17"),
        ({"no_such_setting": 1}, "no-such-setting"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(settings: dict[str, object], message: str, fresh, tmp_path) -> None:
    assert message in fresh(tmp_path / "out", **settings, status=2)
    assert not (tmp_path / "out").exists()


def test_a_run_is_never_overwritten(finished: tuple[Path, str], fresh) -> None:
    before = (finished[0] / "metrics.jsonl").read_bytes()
    assert "already holds a run" in fresh(finished[0], status=2)
    assert (finished[0] / "metrics.jsonl").read_bytes() == before


def test_all_processes_take_the_notch_that_fits_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts its own part of a batch, and another may have less memory."""
    config = train.TrainConfig(n_layer=4, n_head=2, n_embd=64, batch=64, length=512, optimizer="adamw").resolved()
    config = dataclasses.replace(config, memory_budget=str(resident_bytes() + 300 * 2**20))
    tight = [1, 2, "keep-attention", "8bit", True]
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "gather", lambda _, mine: [mine, tight])
        model, chosen = train.make_model(config, Processes())
    assert (model.checkpoint_every, model.recompute) == (2, "keep-attention")
    assert (chosen.moments, chosen.optimizer_in_backward) == ("8bit", True)
    monkeypatch.setattr(Processes, "gather", lambda _, mine: [mine])
    alone, quarter = (train.make_model(config, Processes(world=world))[0] for world in (1, 4))
    assert (alone.checkpoint_every > 0, quarter.checkpoint_every) == (True, 0)


def test_ids_beyond_the_vocabulary_are_found_before_the_run(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for name, largest in (("train.bin", 50256), ("val.bin", 50257)):
        np.array([0] * 4000 + [largest], dtype="<u2").tofile(tokens / name)
    said = run_here(*arguments(TINY | {"data": tokens, "out": tmp_path / "run"}), status=2)
    assert said == f"train.py: {tokens / 'val.bin'}: token id 50257 is outside the vocabulary [0, 50257)\n"
    assert not (tmp_path / "run").exists()


def test_without_enough_memory_the_message_says_what_takes_less(fresh, tmp_path: Path, monkeypatch) -> None:
    def advance(_: train.Trainer) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(train.Trainer, "advance", advance)
    said = fresh(tmp_path / "run", status=1, max_steps=1)
    assert "there is not enough memory for this; a smaller --batch, with --accumulate for as many" in said


def test_a_run_goes_on_when_nobody_reads_it_any_more(text: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "run", {"max_steps": 3, "eval_every": 1}
    words = [sys.executable, "-u", "train.py", *arguments(TINY | steps | {"data": text, "out": out})]
    with subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.wait(100) == 0, process.stderr.read()
    assert (out / "model.safetensors").exists()


def test_the_command_to_go_on_is_that_of_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert command("--out", "a") == "torchrun --nproc-per-node 4 train.py --out a"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    meet = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    assert command("--out", "a") == f"torchrun --nproc-per-node 4 {meet} train.py --out a"
