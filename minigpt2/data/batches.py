"""Tokens to batches. Knows nothing of the model.

A corpus is a list of documents; `<|endoftext|>` follows each. Whole documents go to training or to validation. Batches
are drawn without replacement, epoch by epoch, in an order that the seed and the epoch decide, so that the position of a
run in its data is two integers, epoch and window, and a resumed run continues with the very next batch.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt2.data.documents import DataError, read_documents, standard_library
from minigpt2.data.prepare import META, TRAIN, VALIDATION, prepare

__all__ = [
    "Batches",
    "Corpus",
    "DataError",
    "fingerprint",
    "gather",
    "in_order",
    "is_token_folder",
    "load_corpus",
    "open_corpus",
    "open_tokens",
    "read_documents",
    "standard_library",
]

Tokens = NDArray[np.uint16]


class Corpus(NamedTuple):
    """Token ids (uint16) of the two splits."""

    train: Tokens
    validation: Tokens


def open_tokens(path: str | Path) -> Tokens:
    """A token file (uint16, little-endian) as an array that is mapped from disk, not read."""
    path = Path(path)
    size = path.stat().st_size
    if size % 2:
        raise DataError(f"{path}: {size} bytes are not a whole number of uint16 tokens")
    return np.memmap(path, dtype="<u2", mode="r") if size else np.empty(0, dtype="<u2")


def is_token_folder(path: str | Path | None) -> bool:
    """Whether `path` holds the token files train.bin and val.bin."""
    return path is not None and all((Path(path) / name).is_file() for name in (TRAIN, VALIDATION))


def open_corpus(path: str | Path | None, folder: str | Path, *, progress: bool = False) -> Corpus:
    """The token files in `path`; or text under `path` (see read_documents), tokenised into `folder` unless it was
    before. Either way the tokens stay on disk."""
    if is_token_folder(path):
        folder = Path(path or "")
    elif not (Path(folder) / META).exists():
        prepare(path, folder, progress=progress)
    return Corpus(open_tokens(Path(folder) / TRAIN), open_tokens(Path(folder) / VALIDATION))


def load_corpus(path: str | Path | None, validation_fraction: float = 0.05) -> Corpus:
    """The tokens of the text under `path`, split as `prepare` does it, in memory; token files stay on disk."""
    if is_token_folder(path):
        return open_corpus(path, "")
    with tempfile.TemporaryDirectory() as folder:
        prepare(path, folder, validation_fraction=validation_fraction, progress=False)
        train, validation = (np.fromfile(Path(folder) / name, dtype="<u2") for name in (TRAIN, VALIDATION))
    return Corpus(train, validation)


def fingerprint(tokens: Tokens) -> str:
    """A digest of the number of tokens and of 256 stretches of them: enough to notice another corpus."""
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in np.linspace(0, max(0, len(tokens) - 64), 256).astype(np.int64).tolist():
        digest.update(tokens[start : start + 64].tobytes())
    return digest.hexdigest()


class Batches:
    """Endless batches (input_ids, targets), each (batch, length) int64 with targets shifted by one.

    The tokens are cut into windows of `length`; an epoch visits every window once. `position` counts the windows drawn
    so far, by all processes, and may be set, to continue where another run stopped. Process `rank` of `world` draws its
    rows of each batch, (batch / world, length), and reads no others.
    """

    def __init__(self, tokens: Tokens, batch: int, length: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch % world:
            raise DataError(f"a batch of {batch} sequences cannot be shared evenly by {world} processes")
        self.tokens, self.batch, self.length, self.seed = tokens, batch, length, seed
        self.rank, self.share = rank, batch // world
        self.windows = (len(tokens) - 1) // length
        if self.windows < batch:
            raise DataError(
                f"{len(tokens)} tokens are too few for one batch: {batch} x {length} needs {batch * length + 1}"
            )
        self.position = 0
        self._prepared: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def epoch(self) -> float:
        """How often the tokens have been visited."""
        return self.position / self.windows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch = self._prepared.pop(self.position, None) or self._at(self.position)
        self.position += self.batch
        return batch

    def prepare(self, n: int = 1) -> None:
        """Read the next `n` batches now, while the device computes; the position stays where it is. A batch takes less
        than a millisecond, so this needs no thread."""
        self._prepared = {p: self._at(p) for p in range(self.position, self.position + n * self.batch, self.batch)}

    def _at(self, position: int) -> tuple[Tensor, Tensor]:
        start = position + self.rank * self.share
        return gather(self.tokens, self._windows(start, start + self.share), self.length)

    def _windows(self, start: int, stop: int) -> list[int]:
        windows: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self.windows)
            last = min(first + stop - start, self.windows)
            windows += shuffled(np.arange(first, last), self.windows, [self.seed, epoch]).tolist()
            start += last - first
        return windows


def shuffled(indices: NDArray[np.int64], n: int, seed: list[int]) -> NDArray[np.int64]:
    """Where a permutation of range(n), which `seed` chooses, sends `indices`, without ever holding it.

    A Feistel network is a permutation of the 2^2h numbers of 2h bits whatever its round function; an image that is
    not below n is sent on until one is, which makes it a permutation of range(n) ("cycle walking", Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = np.uint64(max(2, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(seed).generate_state(6, np.uint64)
    values = indices.astype(np.uint64)
    todo = np.ones(len(values), dtype=bool)
    while todo.any():
        left, right = values[todo] >> half, values[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        values[todo] = (left << half) | right
        todo = values >= n
    return values.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
