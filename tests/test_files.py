"""Files on disks that are full, that break, or that lack what this code asks of them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minigpt2.files import atomic_write, errors_name, flush


def refuse(monkeypatch, owner, name: str, number: int, folders: bool | None = None) -> None:
    """A function of the system fails from now on; with `folders`, only for those (or, if False, only for files)."""
    original = getattr(owner, name)

    def call(target, *args, **kwargs):
        path = f"/dev/fd/{target}" if isinstance(target, int) else target
        if folders in (None, Path(path).is_dir()):
            raise OSError(number, os.strerror(number))
        return original(target, *args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file that is there already."""
    path = tmp_path / "weights"
    write(path, "old")
    return path


REFUSALS = [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM]


@pytest.mark.parametrize(("function", "folders"), [("fsync", True), ("fsync", False), ("open", True)])
@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_a_system_that_cannot_sync_is_no_reason_to_fail(old, monkeypatch, function, folders, number) -> None:
    refuse(monkeypatch, os, function, number, folders)
    write(old, "new")
    assert contents(old.parent) == {"weights": "new"}


def test_a_file_system_without_permissions_is_no_reason_to_fail(old, monkeypatch) -> None:
    refuse(monkeypatch, Path, "chmod", errno.EPERM)
    write(old, "new")
    assert contents(old.parent) == {"weights": "new"}


LOSSES = [errno.EIO, errno.ENOSPC, errno.EDQUOT]


@pytest.mark.parametrize("number", LOSSES, ids=errno.errorcode.get)
@pytest.mark.parametrize(("owner", "function"), [(os, "fsync"), (Path, "replace"), (Path, "touch")])
def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(old, monkeypatch, owner, function, number) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, owner, function, number)
        with pytest.raises(OSError, match=f"{os.strerror(number)}: '{old}'") as caught:
            write(old, "new")
    assert caught.value.errno == number
    assert contents(old.parent) == {"weights": "old"}


def test_a_folder_that_breaks_is_named(old, monkeypatch) -> None:
    refuse(monkeypatch, os, "fsync", errno.EIO, folders=True)
    with pytest.raises(OSError, match=f"Input/output error: '{old.parent}'"):
        write(old, "new")
    assert contents(old.parent) == {"weights": "new"}


def test_errors_without_a_file_get_its_name(old) -> None:
    with pytest.raises(OSError, match=rf"\[Errno 28\] No space left on device: '{old}'"), atomic_write(old):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=f"3 requested and 1 written: '{old}'"), errors_name(old):
        raise OSError("3 requested and 1 written")  # as NumPy puts it
    with pytest.raises(FileNotFoundError, match="another"), errors_name(old):
        Path("another").read_text()
    with pytest.raises(FileNotFoundError, match="absent/weights"), atomic_write(old.parent / "absent" / "weights"):
        pass
    assert contents(old.parent) == {"weights": "old"}


def test_an_error_of_safetensors_is_one_of_the_system(old) -> None:
    with pytest.raises(OSError, match=f"'{old}'"), atomic_write(old):
        save_file({"a": torch.ones(1)}, old.parent / "absent" / "file")
    assert contents(old.parent) == {"weights": "old"}


def test_what_is_flushed_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        flush(tmp_path / "absent")
