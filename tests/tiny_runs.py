"""Runs of train.py that take seconds: a model with a vocabulary of 97, and token files for it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from minigpt2 import GPT2, GPT2Config
from minigpt2.files import sha256_of
from minigpt2.training.parallel import fsdp_unavailable

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 97

# What a run writes that must not depend on its interruptions; the rest are times and memory.
EXACT = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss", "val_loss_before", "skipped")


def needs_fsdp() -> None:
    """Skip the test where FSDP2 cannot run."""
    if (reason := fsdp_unavailable(torch.device("cpu"))) is not None:
        pytest.skip(reason)


def make_inputs(folder: Path, n_tokens: int = 40_000) -> list[str]:
    """Write initial weights and token files into `folder`; return the settings of train.py that name them."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_layer=3, n_head=2, n_embd=16)
    no_dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    GPT2(config.replace(bos_token_id=None, eos_token_id=None, **no_dropout)).save_pretrained(folder / "init")
    rng = np.random.default_rng(2)
    # Each token is a function of the last one, one time in four random: something to learn, with a floor.
    tokens = [0]
    for noise in rng.integers(0, 4 * VOCABULARY, n_tokens).tolist():
        tokens.append(noise if noise < VOCABULARY else (5 * tokens[-1] + 3) % VOCABULARY)
    (folder / "tokens").mkdir()
    np.array(tokens[: n_tokens * 9 // 10], dtype="<u2").tofile(folder / "tokens" / "train.bin")
    np.array(tokens[n_tokens * 9 // 10 :], dtype="<u2").tofile(folder / "tokens" / "val.bin")
    settings = {"init": folder / "init", "data": folder / "tokens", "length": 32, "batch": 4, "device": "cpu"}
    settings |= {"eval_every": 5, "eval_batches": 2, "lr": 5e-3}
    return arguments(settings)


def arguments(settings: dict[str, Any]) -> list[str]:
    """The command line of some settings; True is a flag."""
    given = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    return [part for name, value in given.items() for part in ([name] if value is True else [name, str(value)])]


def command(*settings: str, processes: int = 0) -> list[str]:
    """The command that runs train.py, under torchrun with `processes`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), *settings]


def environment() -> dict[str, str]:
    """One thread, as rounding depends on their number; and this checkout's package."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(*settings: str, processes: int = 0) -> str:
    """Run train.py to its end in processes of its own; return what it printed."""
    process = subprocess.run(
        command(*settings, processes=processes), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_here(*settings: str, status: int = 0) -> str:
    """Run train.py in this process, which is quicker. Return what it printed, on standard error if `status`, which its
    exit status must be, is not 0."""
    import train

    printed, errors = io.StringIO(), io.StringIO()
    # The arena of tune_allocator would stay in this process, and tests of memory could not see what it holds.
    argv = ["train.py", *settings, "--no-tune-allocator"]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
    ):
        try:
            ended = train.main()
        except SystemExit as end:  # of the parser of the command line
            ended = end.code
    assert ended == status, errors.getvalue()
    return errors.getvalue() if status else printed.getvalue()


def rows(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run, step by step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path) -> list[dict[str, Any]]:
    """The same without times and memory."""
    return [{key: row[key] for key in EXACT if key in row} for row in rows(out)]


def outcome(out: Path) -> tuple[list[dict[str, Any]], str, str]:
    """The loss curve and the digests of the last and of the best weights."""
    return curve(out), sha256_of(out / "model.safetensors"), sha256_of(out / "best" / "model.safetensors")
