"""Which files under a path are text, which are left out and why, and what has changed since an earlier look."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import stat
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minigpt2.data.documents import DataError, NotText, TextOptions, encodings, pieces_of, read_documents

__all__ = ["Piece", "Source", "Survey", "changes", "pieces_under", "read_list", "read_pieces", "root_of", "survey"]

FIRST = 3
"""Names that a summary gives of each kind."""

# What stands in a folder that a run, a model or `prepare` wrote.
_MARKS = {"train_config.json": "a run", "model.safetensors": "a model", "tokens.json": "tokens"}
_NOT_LOST = {
    "hidden",
    "folder of a run",
    "folder of a model",
    "folder of tokens",
    "link to what is read already",
    "empty",
}


class Source(NamedTuple):
    """A file that is text."""

    name: str
    """Its path from the data's, with slashes."""
    size: int | None
    """Bytes on disk; None of a pipe, which is read once and so was not looked at."""
    modified: int = 0
    """Nanoseconds."""
    encoding: str | None = None
    bytes: int = 0
    """Of its text in UTF-8."""
    digest: str = ""
    """SHA-256 of its text."""


class Piece(NamedTuple):
    """A part of a document, and where reading continues after it."""

    text: str
    ends: bool
    """Whether it is the last of its document."""
    file: int
    """Index of its file."""
    offset: int
    """Bytes of that file's text up to the end of the piece and of a separator after it."""


@dataclass
class Survey:
    """What is under a path."""

    data: str
    files: int = 0
    """Those that are text."""
    bytes: int | None = 0
    """Of their text; None if a pipe is among them."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files, or folders, by the reason."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first of them."""

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < FIRST:
            names.append(name)

    @property
    def reasons(self) -> str:
        """What was left out and why, with the first names."""
        return "; ".join(f"{n} {reason} ({named(self.names[reason], n)})" for reason, n in self.left_out.items())

    def line(self) -> str:
        """The summary."""
        left = f"; left out: {self.reasons}" if self.left_out else "; none left out"
        return f"{self.data}: {self.files:,} {'file' if self.files == 1 else 'files'} of text{left}"

    def check(self, text: TextOptions) -> None:
        """Raise DataError if there is no text, or more than a tenth is left out and that was not allowed."""
        lost = sum(n for reason, n in self.left_out.items() if reason not in _NOT_LOST)
        hint = "; --encoding reads other encodings" if "not UTF-8" in self.left_out and text.encoding is None else ""
        if not self.files:
            why = f"left out: {self.reasons}{hint}" if self.left_out else "the folder is empty"
            raise DataError(f"{self.data}: no text found; {why}")
        if lost * 10 > self.files + lost and not text.allow_left_out:
            share = f"{lost} of {self.files + lost} files cannot be read as text, more than a tenth"
            raise DataError(f"{self.data}: {share}: {self.reasons}{hint}; --allow-left-out goes on without them")


def named(names: list[str], n: int) -> str:
    return ", ".join(names) + (", ..." if n > len(names) else "")


def standard_library() -> Iterator[tuple[str, str | None]]:
    """Python's own standard library, less its tests: text that is on every user's disk."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    return ((name, why) for name, why in _walk(_stdlib(), left_out) if name.endswith(".py") and not why)


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def root_of(data: str | Path | None) -> Path:
    """The folder that the names of sources start from."""
    if data is None:
        return _stdlib()
    return Path(data) if Path(data).is_dir() else Path(data).parent


def survey(
    data: str | Path | None, text: TextOptions, out: Path, known: Iterable[Source] = (), *, progress: bool = False
) -> Survey:
    """Look at every file under `data` (None: the standard library's sources), in the order of the paths, and write the
    list of those that are text to `out`, a line of JSON each. `known`, an earlier list, spares reading those that have
    the size and time they had.

    Raises DataError where there is nothing, or nothing that may be read; and for a file that is `data` itself the
    reason for which it would be left out of a folder.
    """
    path, root = None if data is None else Path(data), root_of(data)
    found = Survey("the standard library" if data is None else str(data))
    alone = path is not None and not path.is_dir()
    if path is None:
        names = standard_library()
    elif alone:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        names = iter([(path.name, None)])
    else:
        if kind := _marked(path):
            hint = "; train.py and eval take them as they are" if kind == "tokens" else ""
            raise DataError(f"{path}: no folder of text but one of {kind}" + hint)
        names = _walk(path)
    earlier = _Earlier(known)
    with (
        out.open("w", encoding="utf-8") as listing,
        tqdm(desc="looking", unit="B", unit_scale=True, leave=False, delay=2, disable=not progress) as bar,
    ):
        for name, reason in names:
            if reason:
                found.leave_out(name, reason)
                continue
            try:
                source = _look_at(root, name, text, earlier.of(name))
            except NotText as error:
                if alone:
                    raise
                found.leave_out(name, error.reason)
                continue
            except PermissionError:
                if alone:
                    raise
                found.leave_out(name, "no permission to read")
                continue
            if source.size is not None and not source.bytes:
                found.leave_out(name, "empty")
                continue
            found.files += 1
            found.bytes = None if source.size is None or found.bytes is None else found.bytes + source.bytes
            listing.write(json.dumps(source) + "\n")
            bar.update(source.bytes)
    found.check(text)
    return found


class _Earlier:
    """A list in the order of its names, asked for names in that order."""

    def __init__(self, known: Iterable[Source]) -> None:
        self.known = iter(known)
        self.next = next(self.known, None)

    def of(self, name: str) -> Source | None:
        while self.next and _key(self.next.name) < _key(name):
            self.next = next(self.known, None)
        return self.next if self.next and self.next.name == name else None


def _key(name: str) -> list[str]:
    return name.split("/")


def _look_at(root: Path, name: str, text: TextOptions, earlier: Source | None) -> Source:
    path = root / name
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return Source(name, None)
    size, modified = status.st_size, status.st_mtime_ns
    if earlier and (earlier.size, earlier.modified) == (size, modified):
        return earlier
    problem: NotText | None = None
    for encoding in encodings(path, text):
        digest, n_bytes = hashlib.sha256(), 0
        try:
            for document in read_documents(path, encoding, text):
                for block in document:
                    contents = block.encode()
                    digest.update(contents)
                    n_bytes += len(contents)
                digest.update(b"\0")
        except NotText as error:
            problem = error
        else:
            return Source(name, size, modified, encoding, n_bytes, digest.hexdigest())
    raise problem or AssertionError


def _marked(folder: Path) -> str | None:
    """What a folder that holds no text for people is."""
    for mark, kind in _MARKS.items():
        if (folder / mark).is_file():
            return kind
    both = all((folder / name).is_file() for name in ("train.bin", "val.bin"))
    return "tokens" if both else None


def _walk(root: Path, skip: Collection[str] = ()) -> Iterator[tuple[str, str | None]]:
    """(name, why it is left out if it is) of each file under `root`, in the order of the paths. Links are followed, but
    for those to what is read in its own place or was read already, and so also for those that lead back up."""
    home, seen = root.resolve(), set()

    def elsewhere(path: Path) -> bool:
        """Whether a link's target is not read anyway."""
        target = path.resolve()
        if home == target or target in home.parents:
            return False
        inside = target.relative_to(home).parts if target.is_relative_to(home) else None
        if inside is not None and not any(_is_hidden(part) for part in inside):
            return False
        return _identity(path) not in seen

    def entries(folder: Path, prefix: str) -> Iterator[tuple[str, str | None]]:
        seen.add(_identity(folder))
        try:
            paths = sorted(folder.iterdir())
        except PermissionError:
            yield prefix, "no permission to read"
            return
        for path in paths:
            name = prefix + path.name
            if path.name in skip:
                continue
            if _is_hidden(path.name):
                yield name, "hidden"
            elif path.is_symlink() and not path.exists():
                yield name, "broken link"
            elif path.is_symlink() and not elsewhere(path):
                yield name, "link to what is read already"
            elif path.is_dir():
                if reason := _marked(path):
                    yield name, f"folder of {reason}"
                elif _identity(path) in seen:
                    yield name, "link to what is read already"
                else:
                    yield from entries(path, f"{name}/")
            elif path.is_file():
                if path.is_symlink():
                    seen.add(_identity(path))
                yield name, None
            else:
                yield name, "neither file nor folder"

    return entries(root, "")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def read_list(path: Path) -> Iterator[Source]:
    """The list that `survey` wrote; nothing if there is none."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (Source(*json.loads(line)) for line in file)


def read_pieces(
    root: Path, sources: Iterable[Source], text: TextOptions, file: int = 0, offset: int = 0
) -> Iterator[Piece]:
    """The documents of the sources, in pieces (see documents.pieces_of), from `offset` of the file with index `file`
    on."""
    for index, source in enumerate(sources):
        if index >= file:
            start = offset if index == file else 0
            for piece, ends, stop in pieces_of(root / source.name, source.encoding, text, start):
                yield Piece(piece, ends, index, stop)


def pieces_under(data: str | Path | None, text: TextOptions = TextOptions()) -> Iterator[Piece]:  # noqa: B008 (frozen)
    """The pieces of all that is text under `data` (see survey)."""
    with tempfile.TemporaryDirectory() as folder:
        survey(data, text, Path(folder, "list"))
        yield from read_pieces(root_of(data), read_list(Path(folder, "list")), text)


def changes(old: Iterable[Source], new: Iterable[Source]) -> str:
    """In words, how the texts of two lists differ; empty if they do not. A file that was only touched does not."""
    tagged = heapq.merge(((s, 0) for s in old), ((s, 1) for s in new), key=lambda pair: _key(pair[0].name))
    added: dict[str, str] = {}
    removed: dict[str, str] = {}
    found: dict[str, list[str]] = {"added": [], "changed": [], "removed": [], "renamed": []}
    for name, group in itertools.groupby(tagged, key=lambda pair: pair[0].name):
        versions = {tag: source for source, tag in group}
        if len(versions) == 2:
            if versions[0].size is None or versions[0].digest != versions[1].digest:
                found["changed"].append(name)
        elif 1 in versions:
            added[name] = versions[1].digest
        else:
            removed[name] = versions[0].digest
    origins = {digest: name for name, digest in removed.items()}
    for name, digest in added.items():
        if origin := origins.pop(digest, None):
            found["renamed"].append(f"{origin} to {name}")
            del removed[origin]
        else:
            found["added"].append(name)
    found["removed"] = list(removed)
    counted = ((how, len(names), named(names[:FIRST], len(names))) for how, names in found.items() if names)
    return ", ".join(f"{n} {'file' if n == 1 else 'files'} {how} ({first})" for how, n, first in counted)
