"""Text to tokens to batches. Knows nothing of the model.

A corpus is a list of documents; `<|endoftext|>` follows each. Whole documents go to training or to validation. Batches
are drawn without replacement, epoch by epoch, in an order that the seed and the epoch decide, so that the position of a
run in its data is one count of windows and a resumed run continues with the very next batch.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer

__all__ = ["Batches", "Corpus", "DataError", "load_corpus", "read_documents", "standard_library"]

Tokens = NDArray[np.uint16]


class DataError(ValueError):
    """Text that is absent, not UTF-8, or too short for what was asked."""


class Corpus(NamedTuple):
    """Token ids (uint16) of the two splits."""

    train: Tokens
    validation: Tokens


def standard_library() -> list[Path]:
    """The sources of Python's own standard library, less its tests: text that is on every user's disk."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))


def read_documents(path: str | Path | None) -> Iterator[str]:
    """The documents of a UTF-8 text file (one) or of a folder (one a file, in order of their paths; hidden files and
    files that are not UTF-8 are left out). None means the standard library's sources."""
    if path is None:
        files = standard_library()
    elif Path(path).is_dir():
        inside = (p for p in Path(path).rglob("*") if p.is_file())
        files = sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))
    elif Path(path).is_file():
        try:
            yield Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text: {error}") from None
        return
    else:
        raise DataError(f"{path}: no such file or folder")
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def load_corpus(path: str | Path | None, validation_fraction: float = 0.05) -> Corpus:
    """Tokenise the documents under `path` (see read_documents) and split them.

    Validation gets whole documents, chosen by a digest of their text, until it has its fraction of the tokens; those
    longer than that come last, the shortest first, and the longest of all stays for training. A corpus of one document
    gives its end.
    """
    tokenizer = get_tokenizer()
    documents = []
    for text in read_documents(path):
        if text:
            order = hashlib.sha256(text.encode("utf-8", "replace")).digest()
            ids = np.array([*tokenizer.encode_ordinary(text), END_OF_TEXT], dtype=np.uint16)
            documents.append((order, ids))
    if not documents:
        raise DataError(f"{path or 'standard library'}: no text found")
    total = sum(len(ids) for _, ids in documents)
    wanted = int(total * validation_fraction)
    if len(documents) == 1:
        ids = documents[0][1]
        return Corpus(ids[: total - wanted], ids[total - wanted :])
    chosen: set[int] = set()
    taken = 0
    for i in sorted(range(len(documents)), key=lambda i: (max(wanted, len(documents[i][1])), documents[i][0]))[:-1]:
        if taken >= wanted:
            break
        chosen.add(i)
        taken += len(documents[i][1])
    train = [ids for i, (_, ids) in enumerate(documents) if i not in chosen]
    validation = [documents[i][1] for i in sorted(chosen)]
    return Corpus(np.concatenate(train), np.concatenate(validation or [documents[0][1][:0]]))


class Batches:
    """Endless batches (input_ids, targets), each (batch, length) int64 with targets shifted by one.

    The tokens are cut into windows of `length`; an epoch visits every window once. `position` counts the windows drawn
    so far and may be set, to continue where another run stopped.
    """

    def __init__(self, tokens: Tokens, batch: int, length: int, seed: int) -> None:
        self.tokens, self.batch, self.length, self.seed = tokens, batch, length, seed
        self.windows = (len(tokens) - 1) // length
        if self.windows < batch:
            raise DataError(
                f"{len(tokens)} tokens are too few for one batch: {batch} x {length} needs {batch * length + 1}"
            )
        self.position = 0
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def epoch(self) -> float:
        """How often the tokens have been visited."""
        return self.position / self.windows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        windows = [self._window(self.position + i) for i in range(self.batch)]
        self.position += self.batch
        return gather(self.tokens, windows, self.length)

    def _window(self, position: int) -> int:
        epoch, index = divmod(position, self.windows)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.windows)
        return int(self._order[1][index])


def gather(tokens: Tokens, windows: list[int], length: int) -> tuple[Tensor, Tensor]:
    """The given windows as (input_ids, targets), each (len(windows), length) int64."""
    rows = np.stack([tokens[w * length : (w + 1) * length + 1] for w in windows]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def in_order(tokens: Tokens, batch: int, length: int, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first windows of `tokens`, in order, in batches of at most `batch`, `most` of them; for evaluation."""
    windows = min((len(tokens) - 1) // length, batch * most)
    if windows < 1:
        raise DataError(f"{len(tokens)} validation tokens are too few for one window of {length}")
    for start in range(0, windows, batch):
        yield gather(tokens, list(range(start, min(start + batch, windows))), length)
