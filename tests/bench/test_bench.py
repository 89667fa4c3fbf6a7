"""The benchmarks run, at sizes that say nothing."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import make_inputs

from minigpt2 import GPT2Config
from minigpt2.bench.generate import bench_generate, memory_rates
from minigpt2.bench.loss import bench_loss
from minigpt2.bench.memory import bench_memory
from minigpt2.bench.step import bench_step, roofline_seconds
from minigpt2.bench.worker import Job, Result, _run, measure

TINY = {"vocab_size": 200, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}


def test_bench_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def measure_here(job: Job) -> Result:
        """Without a process to start, or the arena, which would stay; this process has the peak of earlier tests."""
        assert (job.moments, job.in_backward) in (("fp32", False), ("8bit", True))
        result = _run(dataclasses.replace(job, tuned=False, limit=None))
        return dataclasses.replace(result, peak=result.baseline + 2**20)

    monkeypatch.setattr("minigpt2.bench.memory.measure", measure_here)
    found = bench_memory(
        config=TINY,
        batch=1,
        length=16,
        every=(1,),
        recompute=("block",),
        optimizer=("ordinary", "8bit"),
        steps=2,
        out=tmp_path / "dial",
    )
    assert [setting.name for setting, _ in found] == [
        "no recomputation",
        "checkpoint_every=1",
        "8bit",
        "checkpoint_every=1, 8bit",
        "transformers",
        "transformers, gradient checkpointing",
    ]
    printed = capsys.readouterr().out
    assert printed.startswith("bench memory: ")
    assert "command: " in printed
    for _, result in found:
        assert len(result.seconds) == 1
    with (tmp_path / "dial.csv").open() as file:
        assert [row["setting"] for row in csv.DictReader(file)] == [setting.name for setting, _ in found]
    assert (tmp_path / "dial.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_nothing(job: Job) -> Result:
        if job.library == "transformers":
            assert job.limit == 2**24
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        raise AssertionError("it fits")

    monkeypatch.setattr("minigpt2.bench.memory.measure", measure_nothing)
    monkeypatch.setattr("minigpt2.bench.memory.free_bytes", lambda: 2**24)
    assert bench_memory(config=TINY, batch=1, length=16, every=(1,), recompute=("block",)) == []
    printed = capsys.readouterr().out
    assert "left out: no recomputation: it needs " in printed
    assert "left out: transformers: it needs more than is free" in printed


MEASURES = f"from minigpt2.bench.worker import Job, measure; measure(Job(config={TINY}, length=16, steps=10**5))"


finds_children = pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").is_file(), reason="finds processes in /proc"
)


@finds_children
def test_a_process_that_is_at_work_ends_with_the_one_that_started_it() -> None:
    works = (
        "import sys, time; from minigpt2.bench.worker import end_with; end_with(int(sys.argv[1]))\n"
        "print('at work', flush=True); end = time.monotonic() + 120\nwhile time.monotonic() < end: pass"
    )
    starts = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {works!r}, str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        time.sleep(2)
        try:
            (started,) = listed_in(Path(f"/proc/{process.pid}/task/{process.pid}/children"))
            assert "end_with" in command_line(started)
        finally:
            process.kill()
        waited(lambda: not command_line(started))


@finds_children
@pytest.mark.parametrize("command", [["-c", MEASURES], ["-m", "minigpt2", "bench", "learning"]], ids=["worker", "pool"])
def test_a_benchmark_that_is_killed_leaves_no_process(command: list[str], tmp_path: Path) -> None:
    if command[-1] == "learning":
        make_inputs(tmp_path)
        shape = {"n-layer": 1, "n-head": 2, "n-embd": 16, "length": 16, "batch": 1, "steps": 10**5}
        command = [*command, "--data", str(tmp_path / "tokens"), *(f"--{k}={v}" for k, v in shape.items())]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            waited(lambda: any("bench.worker" in c or "spawn_main" in c for c in map(command_line, listed_in(listed))))
            started = listed_in(listed)
        finally:
            process.terminate()
    waited(lambda: not any(map(command_line, started)))


def listed_in(file: Path) -> list[str]:
    return file.read_text().split()


def command_line(pid: str) -> str:
    """Of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def waited(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("not within a minute")


def test_bench_step(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench_step(config=TINY, batch=1, length=16, steps=3, compare="hf", profile=True)
    measured = [result for results in found.values() for result in results]
    assert [len(result.seconds) for result in measured] == [2, 2]
    assert all(result.peak > result.baseline > 0 for result in measured)
    printed = capsys.readouterr().out
    assert printed.startswith("bench step: ")
    assert "roofline share" in printed
    assert "x as fast" in printed
    assert re.search(r"^ +\d+\.\d%  attention$", printed, re.MULTILINE)
    assert roofline_seconds(GPT2Config().replace(**TINY), 1, 16) > 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_bench_step_of_muon_runs_adamw_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench_step(config=TINY, batch=1, length=16, steps=2, optimizer="muon")
    assert list(found) == ["minigpt2", "adamw"]
    assert found["minigpt2"][0].loss != found["adamw"][0].loss
    assert "fp32, muon; 1 x 2 steps" in capsys.readouterr().out


def test_bench_generate(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench_generate(config=TINY, batches=(1, 3), tokens=12, prompt=4, rounds=2)
    assert [row.batch for row in found] == [1, 3]
    for row in found:
        assert row.same_ids
        assert row.weight_bytes == 4 * (200 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32)  # no position embedding
        assert list(row.seconds) == ["minigpt2", "transformers"]
        assert 0 < row.share < row.share_with_cache
        assert row.ratio is not None
        assert row.ratio[1] <= row.ratio[0] <= row.ratio[2]
    printed = capsys.readouterr().out
    assert printed.startswith("bench generate: ")
    assert printed.count("of the memory-bandwidth limit") == printed.count("the same ids") == 2
    assert all(rate > 0 for rate in memory_rates(2**16))


@pytest.mark.slow
def test_bench_loss(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The arena would stay in this process, and tests of memory could not see what it holds.
    monkeypatch.setattr("minigpt2.bench.loss.tune_allocator", lambda: "as it was")
    found = bench_loss(tokens=2, rounds=2)
    assert list(found) == (["minigpt2", "torch"] if hasattr(F, "linear_cross_entropy") else ["minigpt2"])
    for seconds, peak in found.values():
        assert len(seconds) == 2
        assert peak > 0.9 * 4 * 50257 * 768  # the gradient of the head
    printed = capsys.readouterr().out
    assert printed.startswith("bench loss: ")
    assert "minigpt2: " in printed
    with pytest.raises(ValueError, match="must be >= 1"):
        bench_loss(tokens=0)


def test_a_generation_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"20 \+ 13 tokens do not fit the context length 32"):
        bench_generate(config=TINY, tokens=13, prompt=20)
    with pytest.raises(ValueError, match="must be >= 1"):
        bench_generate(config=TINY, batches=(1, 0))
    with pytest.raises(ValueError, match="must be >= 1"):
        bench_generate(config=TINY, tokens=0)


def test_a_job_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="checkpoint_every must be an integer from 0"):
        measure(Job(config=TINY, batch=1, length=16, checkpoint_every=5, steps=1))


def test_only_official_models() -> None:
    with pytest.raises(ValueError, match=r"model must be one of gpt2, .*, got 'gpt3'"):
        bench_memory("gpt3")
