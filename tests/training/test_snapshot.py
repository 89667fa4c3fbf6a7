"""Snapshots: complete or not there, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import environment

from minigpt2.training import snapshot
from minigpt2.training.snapshot import SnapshotError, newest, random_state, save, set_random_state


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    weights = {"a": torch.full((3, 5), step + 0.5), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    return {"weights": weights, "optimizer": {"a/step": torch.tensor(float(step)), "a/exp_avg": torch.ones(3, 5)}}


def write(root: Path, *steps: int, keep: int = 0) -> None:
    for step in steps:
        save(root, step, tensors(step), {"note": f"s{step}"}, keep)


def check_intact(found: snapshot.Snapshot) -> None:
    """Everything in it is of its step."""
    assert found.state["note"] == f"s{found.step}"
    for group, expected in tensors(found.step).items():
        got = found.tensors(group)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) and got[name].dtype == expected[name].dtype for name in got)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    write(tmp_path, 3, 12)
    found, passed_over = newest(tmp_path)
    assert found is not None
    assert found.step == 12
    assert not passed_over
    check_intact(found)


def test_only_safetensors_and_json(tmp_path: Path) -> None:
    write(tmp_path, 1)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_keeps_the_newest(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_damaged_one_that_is_newer_does_not_push_out_an_intact_one(tmp_path: Path) -> None:
    write(tmp_path, 5, 9)
    (tmp_path / "step-00000009" / "state.json").write_text("")
    write(tmp_path, 6, 7, keep=1)
    found, passed_over = newest(tmp_path)
    assert found is not None
    assert found.step == 7
    assert len(passed_over) == 1
    write(tmp_path, 9, keep=1)  # the same step again replaces it
    found, passed_over = newest(tmp_path)
    assert found is not None
    assert (found.step, passed_over) == (9, [])


def test_nothing_there(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path, 1, 2)
    file = tmp_path / "step-00000002" / name
    contents = file.read_bytes()
    places = {"flip": range(0, len(contents), 7), "truncate": range(1, len(contents), 61)}.get(damage, [0])
    for place in places:
        if damage == "delete":
            file.unlink()
        elif damage == "flip":
            file.write_bytes(contents[:place] + bytes([contents[place] ^ 1]) + contents[place + 1 :])
        else:
            file.write_bytes(contents[:place])
        found, passed_over = newest(tmp_path)
        assert found is not None
        check_intact(found)
        if name != "manifest.json":  # a flip in its white space changes nothing, one in a name blames that file
            assert found.step == 1
            assert name in passed_over[0]


def test_every_instant_of_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation on the disk in turn is the last one of the process."""

    class Killed(BaseException):
        pass

    remaining = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in [
        (snapshot, "flush"), (snapshot, "save_file"), (snapshot, "sha256_of"), (snapshot.shutil, "rmtree"),
        (Path, "rename"), (Path, "mkdir"), (Path, "write_text"), (Path, "chmod"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    outcomes = []
    for kill_at in itertools.count(1):
        root = tmp_path / str(kill_at)
        remaining = 0
        write(root, 1, 2, keep=2)
        remaining = kill_at
        ended = False
        with contextlib.suppress(Killed):
            write(root, 3, keep=2)
            ended = True
        remaining = 0
        found, passed_over = newest(root)
        assert found is not None
        assert found.step in (2, 3)
        assert passed_over == []
        check_intact(found)
        outcomes.append(found.step)
        write(root, 4, keep=2)
        assert not list(root.glob(".*")), "what a killed process leaves goes with the next snapshot"
        if ended:
            break
    assert outcomes == sorted(outcomes)
    assert outcomes.count(2) > 10
    assert outcomes.count(3) > 2


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "flush", full)
    with pytest.raises(SnapshotError, match=r"No space left on device; the newest intact snapshot is .*step-00000001"):
        write(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """The system itself refuses to write, in the middle of a file."""
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SnapshotError, match=r"cannot write .*step-00000002"):
            save(tmp_path, 2, {"weights": {"a": torch.ones(100, 1000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found, _ = newest(tmp_path)
    assert found is not None
    check_intact(found)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="there is no intact snapshot"):
        write(tmp_path / "file" / "snapshots", 1)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.EXDEV], ids=errno.errorcode.get)
def test_a_file_system_that_lacks_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Without fsync, permissions, or another name for a folder that is there already, as in a container's image."""
    write(tmp_path, 1, 2, keep=1)
    rename = Path.rename

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "rename", lambda p, to: rename(p, to) if str(to).endswith(f"{3:08}") else refuse())
    monkeypatch.setattr(Path, "chmod", refuse)
    if number != errno.EXDEV:
        monkeypatch.setattr(os, "fsync", refuse)
    write(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    found, _ = newest(tmp_path)
    assert found is not None
    check_intact(found)


def test_a_snapshot_that_cannot_be_deleted_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot.shutil, "rmtree", lambda *args, **kwargs: None)
        write(tmp_path, 2, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-00000001.old.tmp", "step-00000002"]
    write(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_the_state_of_random_numbers() -> None:
    cpu = torch.device("cpu")
    torch.rand(3)
    states = random_state(cpu)
    first = torch.randn(5)
    set_random_state(states | {"python": [3, [1], None], "numpy": {}}, cpu)  # as older snapshots have them
    assert torch.equal(torch.randn(5), first)


def test_tensors_are_not_copied_on_the_way_to_disk() -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    assert snapshot.optimizer_tensors(model, optimizer) == {}
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    weights, states = snapshot.weight_tensors(model), snapshot.optimizer_tensors(model, optimizer)
    assert weights["bias"].data_ptr() == model.bias.data_ptr()
    assert states["bias/exp_avg"].data_ptr() == optimizer.state[model.bias]["exp_avg"].data_ptr()
    assert states.keys() == {f"{n}/{k}" for n in ("weight", "bias") for k in ("step", "exp_avg", "exp_avg_sq")}
    assert snapshot.weight_tensors(model, keep=False) == {}


def test_weights_that_do_not_fit_are_named() -> None:
    model = torch.nn.Linear(2, 3)
    with pytest.raises(SnapshotError, match=r"bias is missing; other is unexpected; weight is \(2, 3\)"):
        snapshot.load_weights(model, {"weight": torch.ones(2, 3), "other": torch.ones(1)})


def test_a_snapshot_is_written_without_a_second_copy(tmp_path: Path) -> None:
    """In a process of its own, whose peak is that of the snapshot."""
    code = f"""
import torch
from pathlib import Path
from minigpt2.device import peak_bytes
from minigpt2.training.snapshot import save
tensors = {{str(i): torch.ones(2**23) for i in range(4)}}
before = peak_bytes(torch.device("cpu"))
save(Path({str(tmp_path)!r}), 1, {{"weights": tensors}}, {{}})
print(peak_bytes(torch.device("cpu")) - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 2**27 / 4
