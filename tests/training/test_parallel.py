"""Two processes do what one does, and end when one of them dies. On the CPU, with gloo."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import arguments, command, curve, environment, launch, needs_fsdp, run_here

from minigpt2.training.snapshot import newest

SETTINGS = {"accumulate": 2, "snapshot_every": 10, "max_steps": 20, "warmup": 3, "keep": 9}


@pytest.fixture(scope="module")
def single(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    run_here(*inputs, *arguments(SETTINGS), "--out", str(out))
    return out


def check_alike(out: Path, single: Path) -> None:
    """The same steps with the same losses to 1e-5, and the weights to what follows from that."""
    ours, expected = curve(out), curve(single)
    assert [row["step"] for row in ours] == [row["step"] for row in expected] == list(range(1, 21))
    for a, b in zip(ours, expected, strict=True):
        assert a.keys() == b.keys()
        assert a["tokens"] == b["tokens"]
        for key in ("loss", "val_loss", "val_loss_before"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    weights, reference = (load_file(folder / "model.safetensors") for folder in (out, single))
    assert weights.keys() == reference.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def sharded(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes with FSDP2 and recomputation."""
    needs_fsdp()
    out = tmp_path_factory.mktemp("sharded") / "run"
    settings = arguments(SETTINGS | {"parallel": "fsdp", "checkpoint_every": 1})
    assert "cpu x 2 (fsdp)" in launch(*inputs, *settings, "--out", str(out), processes=2)
    return out


def test_fsdp_equals_one_process(sharded: Path, single: Path) -> None:
    check_alike(sharded, single)


def test_ddp_equals_one_process(inputs: list[str], single: Path, tmp_path: Path) -> None:
    printed = launch(*inputs, *arguments(SETTINGS), "--out", str(tmp_path / "run"), processes=2)
    assert "cpu x 2 (ddp)" in printed
    assert printed.count("validation loss before training") == 1
    check_alike(tmp_path / "run", single)


def rewound(run: Path, to: Path) -> Path:
    """A copy of a run whose last snapshot is of step 10."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "snapshots" / "step-00000020")
    return to


def test_a_snapshot_of_two_processes_resumes_on_one(run, sharded: Path, single: Path, tmp_path: Path) -> None:
    out = rewound(sharded, tmp_path / "run")
    assert "step-00000010" in run(out, resume=True)
    check_alike(out, single)


@pytest.mark.slow
def test_a_snapshot_of_one_process_resumes_on_two(single: Path, tmp_path: Path) -> None:
    out = rewound(single, tmp_path / "run")
    assert "step-00000010" in launch("--out", str(out), "--resume", "--parallel", "fsdp", processes=2)
    check_alike(out, single)


@pytest.mark.slow
def test_a_sharded_run_goes_on_sharded(sharded: Path, single: Path, tmp_path: Path) -> None:
    """The command that a stopped run prints names no --parallel."""
    out = rewound(sharded, tmp_path / "run")
    assert "cpu x 2 (fsdp)" in launch("--out", str(out), "--resume", processes=2)
    check_alike(out, single)


def test_snapshots_do_not_depend_on_the_processes(sharded: Path, single: Path) -> None:
    ours, expected = newest(sharded / "snapshots")[0], newest(single / "snapshots")[0]
    assert ours is not None
    assert expected is not None
    assert len(ours.state["random"]) == 2
    assert ours.state["data"] == expected.state["data"]
    for group in ("weights", "optimizer"):
        a, b = ours.tensors(group), expected.tensors(group)
        assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}


def workers(launcher: subprocess.Popen[bytes]) -> dict[str, int]:
    """The process ids of torchrun's workers, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"\nPPid:\t{launcher.pid}\n" in (entry / "status").read_text():
                variables = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
                found[variables["RANK"]] = int(entry.name)
        except (OSError, KeyError):
            continue
    return found


@pytest.fixture
def endless(inputs: list[str], tmp_path: Path):
    """A run of two processes that has taken its first steps."""
    settings = arguments(SETTINGS | {"max_steps": 100_000, "snapshot_every": 0})
    argv = command(*inputs, *settings, "--out", str(tmp_path / "run"), processes=2)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, env=environment(), **quiet) as launcher:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while launcher.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        yield launcher
        launcher.kill()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for processes in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_ends_the_run(endless: subprocess.Popen[bytes], rank: str) -> None:
    ranks = workers(endless)
    assert ranks.keys() == {"0", "1"}
    os.kill(ranks[rank], signal.SIGKILL)
    assert endless.wait(timeout=90) != 0
    assert workers(endless) == {}


def test_a_signal_to_torchrun_leaves_a_snapshot(endless: subprocess.Popen[bytes], tmp_path: Path) -> None:
    endless.send_signal(signal.SIGTERM)
    assert endless.wait(timeout=90) != 0
    found, passed_over = newest(tmp_path / "run" / "snapshots")
    assert found is not None
    assert not passed_over
    assert found.step == len(curve(tmp_path / "run"))


def test_parallel_needs_torchrun(run, tmp_path: Path) -> None:
    assert "torchrun --nproc-per-node" in run(tmp_path / "run", parallel="fsdp", status=2)
    assert not (tmp_path / "run").exists()
