"""Text as the tests look at it: whole, and in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minigpt2.data.batches import Corpus, open_corpus
from minigpt2.data.documents import read_pieces
from minigpt2.data.prepare import prepare


def read_documents(path: str | Path | None, separator: str | None = None) -> Iterator[str]:
    """The documents under `path`."""
    text = ""
    for piece in read_pieces(path, separator):
        text += piece.text
        if piece.ends:
            yield text
            text = ""


def load_corpus(path: str | Path, validation_fraction: float = 0.05) -> Corpus:
    """The tokens of the text under `path`."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(path, folder, validation_fraction=validation_fraction, progress=False)
        return Corpus(*(np.array(tokens) for tokens in open_corpus(folder, "")))
