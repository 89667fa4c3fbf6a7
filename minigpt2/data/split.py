"""Documents to training and validation, in memory of a fixed size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt2.files import atomic_write

__all__ = ["BUCKETS", "DOCUMENT", "TOKEN", "split"]

BUCKETS = 1 << 16
DOCUMENT = np.dtype([("bucket", "<u2"), ("tokens", "<u8")])
TOKEN = np.dtype("<u2")


class Choice(NamedTuple):
    """What validation gets."""

    short: int
    """The longest document that may go there whole, in tokens."""
    limit: int
    """All documents no longer than that go there whose bucket is below this."""
    cut: int
    """The document whose end goes there; -1: none."""
    end: int
    """Tokens of that end."""


def split(part: Path, train: Path, validation: Path, fraction: float, end_of_text: int) -> dict[str, int]:
    """Write the two token files from the tokens.bin and documents.bin in `part`; return the tokens in each.

    Validation gets documents, whole, in the order of a digest of their text, until it is as near as can be to
    `fraction` of the tokens. Documents longer than that share stay in training; if the others are too few, the longest
    of all gives its end for the rest, and so does a document that is alone.
    """
    choice = _choose(part, fraction)
    tokens = np.memmap(part / "tokens.bin", dtype=TOKEN, mode="r")

    def write(path: Path, validation: bool) -> int:
        position = 0
        with atomic_write(path) as temporary:
            with temporary.open("wb") as file:  # closed before it is renamed
                for number, (bucket, length) in enumerate(_records(part)):
                    stop = position + length
                    if number == choice.cut:
                        middle = stop - choice.end
                        file.write(tokens[middle:stop].data if validation else tokens[position:middle].data)
                        if not validation and length < len(tokens):  # the next document does not go on with it
                            file.write(np.array([end_of_text], dtype=TOKEN).data)
                    elif (length <= choice.short and bucket < choice.limit) == validation:
                        file.write(tokens[position:stop].data)
                    position = stop
            return temporary.stat().st_size // TOKEN.itemsize

    return {"train_tokens": write(train, False), "validation_tokens": write(validation, True)}


def _choose(part: Path, fraction: float) -> Choice:
    """Counting by buckets takes the documents in the order of a digest of their text."""
    wanted = int(sum(int(block["tokens"].sum()) for block in _blocks(part)) * fraction)
    weight = np.zeros(BUCKETS, dtype=np.int64)
    longest, cut, number = (0, 0), -1, 0  # of two of one length, the one of the greater bucket
    for block in _blocks(part):
        lengths, buckets = block["tokens"].astype(np.int64), block["bucket"].astype(np.int64)
        short = lengths <= wanted
        np.add.at(weight, buckets[short], lengths[short])
        last = int(np.lexsort((buckets, lengths))[-1])
        if (candidate := (int(lengths[last]), int(buckets[last]))) > longest:
            longest, cut = candidate, number + last
        number += len(block)
    given = int(weight.sum())
    if not wanted:
        return Choice(0, 0, -1, 0)
    if longest[0] > wanted and given < wanted:
        return Choice(wanted, BUCKETS, cut, wanted - given)
    buckets = np.flatnonzero(weight)
    taken = np.concatenate([[0], np.cumsum(weight[buckets])])
    if longest[0] <= wanted:  # and so no document stays in training anyway
        taken = taken[:-1]
    n = int(np.abs(taken - wanted).argmin())
    return Choice(wanted, int(buckets[n]) if n < len(buckets) else BUCKETS, -1, 0)


def _blocks(part: Path) -> Iterator[NDArray[Any]]:
    """The records of documents.bin, many at a time."""
    with (part / "documents.bin").open("rb") as file:
        while block := file.read(BUCKETS * DOCUMENT.itemsize):
            yield np.frombuffer(block, dtype=DOCUMENT)


def _records(part: Path) -> Iterator[tuple[int, int]]:
    for block in _blocks(part):
        yield from block.tolist()
