"""Odd machines: how much memory there is, in containers of both kinds and without /proc; output that is not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import arguments, environment

from minigpt2 import device, memory
from minigpt2.__main__ import plan
from minigpt2.machine import free_bytes

MEMINFO = {"proc/meminfo": "MemTotal:       64000 kB\nMemFree:         1000 kB\nMemAvailable:   50000 kB\n"}
TOP, POD = "sys/fs/cgroup", "sys/fs/cgroup/kube/pod"
V1 = "sys/fs/cgroup/memory"
UNLIMITED = "9223372036854771712\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(folder: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    stat = f"active_file 7\ninactive_file {inactive}\n"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": str(used), f"{folder}/memory.stat": stat}


def v1(folder: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}\n"
    names = "limit_in_bytes", "usage_in_bytes", "stat"
    return {f"{folder}/memory.{name}": text for name, text in zip(names, (limit, str(used), stat), strict=True)}


IN_POD = {"proc/self/cgroup": "0::/kube/pod\n"}
IN_V1 = {"proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/\n0::/kube/pod\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 50000 * 1024),
        (MEMINFO | IN_POD | v2(POD, "max\n", 5), 50000 * 1024),
        (MEMINFO | IN_POD | v2(POD, "9000\n", 5000, 300), 4300),
        (MEMINFO | IN_POD | v2(POD, "max\n", 5) | v2("sys/fs/cgroup/kube", "7000\n", 4000), 3000),
        (MEMINFO | IN_POD | v2(POD, "9000\n", 5000) | {f"{POD}/memory.high": "6000\n"}, 1000),
        (MEMINFO | IN_POD | v2(POD, "9000\n", 9500), 0),
        (MEMINFO | IN_POD | v2(TOP, "9000\n", 5000), 4000),  # a container's own group, seen from inside as the root
        (MEMINFO | IN_V1 | v1(f"{V1}/docker/abc", "9000\n", 5000, 300) | v1(V1, UNLIMITED, 10**9), 4300),
        (MEMINFO | IN_V1 | v1(V1, "9000\n", 5000), 4000),
        (MEMINFO | IN_V1 | v1(V1, UNLIMITED, 10**9), 50000 * 1024),
        (v2(TOP, "9000\n", 5000), 4000),  # without /proc
        (v1(V1, "9000\n", 5000), 4000),
    ],
)
def test_what_is_free_is_what_the_system_and_the_control_groups_leave(tmp_path, files, expected) -> None:
    assert free_bytes(machine(tmp_path, files)) == expected


def test_without_proc_the_system_call_tells(tmp_path: Path) -> None:
    assert 0 < free_bytes(tmp_path) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_system_that_does_not_say_wants_an_amount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf_names", {})
    with pytest.raises(ValueError, match="does not say how much memory is free; give an amount, such as 4GiB"):
        free_bytes(tmp_path)


def test_auto_is_what_is_held_and_what_is_free_shared_by_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 8 * 2**30)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 2**30)
    assert memory.parse_budget("auto", "cpu") == 2**30 + int(0.95 * 8 * 2**30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.parse_budget("auto", "cpu") == 2**30 + int(0.95 * 4 * 2**30)
    assert memory.parse_budget("3GiB", "cpu") == 3 * 2**30
    with pytest.raises(ValueError, match="there is no mps device here to say how much memory is free"):
        memory.parse_budget("auto", "mps")


def test_plan_takes_auto(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 3 * 2**30)
    for module in (memory, device):  # whatever the tests before have left in this process
        monkeypatch.setattr(module, "resident_bytes", lambda: 2**29)
    plan("gpt2", 4, 1024, budget="auto")
    printed = capsys.readouterr().out
    assert "the budget is 3.35 GiB" in printed
    (chosen,) = [line for line in printed.splitlines() if "<-" in line]
    assert chosen.split()[-6:] == ["<-", "ordinary:", "the", "fastest", "that", "fits"]


def test_a_finished_run_ends_well_where_its_text_cannot_be_printed(tmp_path: Path) -> None:
    """Neither its text nor its path, in ASCII; and nothing minds a path with a space in it."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 200)
    code = "import sys, train; train.sample_text = lambda *_: 'a \u4e16\u754c b'; sys.exit(train.main())"
    out = tmp_path / "gr\u00f6\u00dfer \u4e16"
    settings = {"n_layer": 1, "n_head": 1, "n_embd": 16, "length": 16, "batch": 2, "max_steps": 1, "eval_batches": 1}
    settings |= {"data": tmp_path / "text.txt", "out": out}
    with (tmp_path / "printed").open("wb") as printed:
        command = [sys.executable, "-c", code, *arguments(settings)]
        env = environment() | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, env=env, stdout=printed, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "printed").read_bytes().endswith(b"a sample of its text:\na ?? b\n")
    assert (out / "model.safetensors").exists()
