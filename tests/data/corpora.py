"""What the tests of data read and write: documents of text, and the token files made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minigpt2.data.documents import read_pieces
from minigpt2.data.prepare import prepare
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer


def encode(text: str) -> list[int]:
    return get_tokenizer().encode(text)


def read_documents(path: Path | None, separator: str | None = None) -> Iterator[str]:
    """The documents under `path`, each of them one string."""
    text = ""
    for piece in read_pieces(path, separator):
        text += piece.text
        if piece.ends:
            yield text
            text = ""


def split(path: Path, out: Path, **settings: object) -> tuple[np.ndarray, np.ndarray]:
    """The tokens for training and for validation that `prepare` makes of the text under `path`."""
    prepare(path, out, progress=False, **settings)
    train, validation = (np.fromfile(out / name, dtype="<u2") for name in ("train.bin", "val.bin"))
    return train, validation


def documents(tokens: np.ndarray) -> list[str]:
    """The texts of a split, which must end with <|endoftext|>."""
    *ends, last = np.flatnonzero(tokens == END_OF_TEXT).tolist()
    assert last == len(tokens) - 1
    starts = [0, *(end + 1 for end in ends)]
    return [get_tokenizer().decode(tokens[a:b].tolist()) for a, b in zip(starts, [*ends, last], strict=True)]
