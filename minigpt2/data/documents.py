"""Text on disk as documents, read in pieces, so that neither a corpus nor a document is ever in memory as a whole."""

from __future__ import annotations

import codecs
import hashlib
import re
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from minigpt2.files import errors_name

__all__ = ["DataError", "Piece", "read_pieces", "standard_library", "text_files"]

PIECE = 1 << 20
"""Characters in a piece, at most."""

# Before one space or newline between two characters that are neither, GPT-2's pattern for pre-tokens always starts a
# new one, so a text cut there has the tokens of its two parts.
_CUT = re.compile(r"(?<=\S)[ \n](?=\S)")


class DataError(ValueError):
    """Text that is absent, not UTF-8, or too short for what was asked."""


class Piece(NamedTuple):
    """A part of a document, and where reading continues after it."""

    text: str
    ends: bool
    """Whether it is the last of its document."""
    file: int
    """Index of its file."""
    offset: int
    """Bytes of that file up to the end of the piece and of a separator after it."""
    seen: str
    """A digest of the path, size and modification time of every file so far."""


def standard_library() -> list[Path]:
    """The sources of Python's own standard library, less its tests: text that is on every user's disk."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    return [p for p in _walk(root, left_out) if p.suffix == ".py"]


def text_files(path: str | Path | None) -> Iterator[Path]:
    """The one file, or the files of a folder in order of their paths, less hidden ones. None means the standard
    library's sources. Raises DataError where there is nothing."""
    if path is None:
        return iter(standard_library())
    if Path(path).is_dir():
        return _walk(Path(path))
    if Path(path).is_file():
        return iter([Path(path)])
    raise DataError(f"{path}: no such file or folder")


def _walk(folder: Path, left_out: Collection[str] = ()) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in left_out:
            continue
        if path.is_dir():
            if not path.is_symlink():  # which may lead back up
                yield from _walk(path, left_out)
        elif path.is_file():
            yield path


def read_pieces(
    path: str | Path | None, separator: str | None = None, file: int = 0, offset: int = 0
) -> Iterator[Piece]:
    """The documents under `path` (see text_files), in pieces of at most PIECE characters, from byte `offset` of the
    file with index `file` on.

    A file is one document, or several where it contains `separator`. The tokens of a document are those of its pieces,
    unless a million characters go by without a word's end. A file that is not UTF-8 raises DataError when it is `path`
    itself, and is left out of a folder. Where reading starts does not change the pieces that follow.
    """
    alone = path is not None and Path(path).is_file()
    seen = ""
    for index, source in enumerate(text_files(path)):
        status = source.stat()
        seen = hashlib.sha256(f"{seen} {source} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
        if index < file:
            continue
        if problem := _not_utf8(source):
            if alone:
                raise DataError(f"{source}: not UTF-8 text: {problem}")
            continue
        start = offset if index == file else 0
        for text, ends, stop in _pieces_of(source, separator, start):
            yield Piece(text, ends, index, stop, seen)


def _pieces_of(path: Path, separator: str | None, offset: int) -> Iterator[tuple[str, bool, int]]:
    """(text, whether it ends a document, offset of the next piece)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    buffer, begin, at_end = "", 0, False
    margin = len(separator) if separator else 1  # enough to see what follows a piece of full length
    with errors_name(path), path.open("rb") as file:
        file.seek(offset)
        while True:
            while not at_end and len(buffer) - begin < PIECE + margin:
                block = file.read(PIECE)
                at_end = not block
                buffer, begin = buffer[begin:] + decoder.decode(block, at_end), 0
            if begin == len(buffer):
                return
            limit, after, ends = begin + PIECE, "", True
            found = buffer.find(separator, begin, limit + margin) if separator else -1
            if found >= 0:
                stop, after = found, separator or ""
            elif len(buffer) <= limit:
                stop = len(buffer)
            else:
                stop, ends = _last_cut(buffer, begin, limit), False
            text = buffer[begin:stop]
            begin = stop + len(after)
            offset += len(text.encode()) + len(after.encode())
            yield text, ends, offset


def _last_cut(buffer: str, begin: int, end: int) -> int:
    for near in (end - 4096, begin + 1):
        cuts = [match.start() for match in _CUT.finditer(buffer, max(near, begin + 1), end)]
        if cuts:
            return cuts[-1]
    return end


def _not_utf8(path: Path) -> str | None:
    """What is wrong with the file as UTF-8, if anything is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with errors_name(path), path.open("rb") as file:
        try:
            while block := file.read(PIECE):
                decoder.decode(block)
            decoder.decode(b"", True)
        except UnicodeDecodeError as error:
            return str(error)
    return None
