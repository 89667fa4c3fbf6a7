"""Files that are complete or not there, and errors of the system that say which file they are about."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["atomic_write", "errors_name", "flush", "removed_on_error", "sha256_of"]

# How file systems say that they cannot sync, folders above all: CIFS, VirtualBox, WSL, some of FUSE; and Windows, which
# opens no folder. EIO, ENOSPC and EDQUOT are not among them: those tell of data that is lost.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EROFS}
_NO_SYNC |= {errno.EACCES, errno.EPERM}


@contextmanager
def errors_name(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """Make an OSError of the block name `path` if it names no file, as when a write fails, or if it names `instead_of`.
    The error with which safetensors says that it cannot write becomes such an OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) not in (None, str(instead_of)):
            raise
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        raise OSError(number or errno.EIO, reason or str(error), str(path)) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path` in one step.

    Whatever happens, `path` holds all of the old contents or all of the new ones, and nothing is left beside it unless
    the process was killed. Errors of the system name `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with errors_name(path, instead_of=temporary):
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            flush(temporary)
            with suppress(OSError):  # some file systems know no permissions
                temporary.chmod(mode)  # safetensors makes private files
            temporary.replace(path)
        flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """If the block raises an Exception, remove `folder`, unless it was there before."""
    existed = folder.exists()
    try:
        yield
    except Exception:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Have the system write a file or a folder to disk before this returns, where the file system can do that."""
    with errors_name(path):
        try:
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with errors_name(path), path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
