"""Tokens to batches. Knows nothing of the model.

A corpus is a list of documents; `<|endoftext|>` follows each. Batches are drawn without replacement, epoch by epoch,
from places and in an order that the seed and the epoch decide, so that the position of a run in its data is two
integers, epoch and window, and a resumed run continues with the very next batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt2.data.documents import DataError, TextOptions
from minigpt2.data.prepare import META, TRAIN, VALIDATION, check_tokenizer, prepare
from minigpt2.files import errors_name
from minigpt2.tokenizer import Tokenizer

__all__ = [
    "ORDER",
    "Batches",
    "Corpus",
    "DataError",
    "check_enough",
    "check_ids",
    "fingerprint",
    "gather",
    "in_order",
    "is_token_folder",
    "open_corpus",
    "open_tokens",
]

Tokens = NDArray[np.uint16]

ORDER = "windows shifted and permuted by the seed and the epoch, NumPy PCG64"
"""The name of the order in which `Batches` reads, which a snapshot keeps: change it whenever the order changes."""


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
    with errors_name(path):
        return np.memmap(path, dtype="<u2", mode="r") if size else np.empty(0, dtype="<u2")


def is_token_folder(path: str | Path | None) -> bool:
    """Whether `path` holds the token files train.bin and val.bin."""
    return path is not None and all((Path(path) / name).is_file() for name in (TRAIN, VALIDATION))


def open_corpus(
    path: str | Path | None,
    folder: str | Path,
    text: TextOptions = TextOptions(),  # noqa: B008 (frozen)
    *,
    renew: bool = False,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
) -> Corpus:
    """The token files in `path`; or the text under `path` (see prepare.prepare), tokenised into `folder` unless that
    was done before. With `renew`, tokens that are there already are replaced if they are not of that text as it is now;
    without, they are taken as they are. Either way the tokens stay on disk. Raises TokenizerError where they are of
    another tokenizer than the one given; none given makes tokens of text with OpenAI's, and takes the files of any."""
    if is_token_folder(path):
        folder = Path(path or "")
    elif renew or not (Path(folder) / META).exists():
        prepare(path, folder, text, renew=renew, tokenizer=tokenizer, progress=progress)
    if tokenizer is not None:
        check_tokenizer(Path(folder), tokenizer)
    return Corpus(open_tokens(Path(folder) / TRAIN), open_tokens(Path(folder) / VALIDATION))


def check_enough(corpus: Corpus, batch: int, length: int, world: int = 1) -> None:
    """Raise DataError, with settings that would do, unless the corpus has a batch to train on and a window to validate
    on. `world` processes share a batch."""
    have, validation = len(corpus.train), len(corpus.validation)
    if have > batch * length and validation > length:
        return
    needs = f"--batch {batch} --length {length} needs {batch * length + 1:,} and {length + 1:,}"
    message = f"{have:,} training and {validation:,} validation tokens are too few: {needs}"
    shorter = (
        1 << (min(length, validation - 1, (have - 1) // world)).bit_length() - 1 if min(have, validation) > 1 else 0
    )
    fitting = min(batch, (have - 1) // shorter) // world * world if shorter else 0
    if not fitting:
        raise DataError(f"{message}; more text is needed")
    raise DataError(f"{message}; with this data --batch {fitting} --length {shorter} would do")


def check_ids(corpus: Corpus, folder: Path, vocab_size: int) -> None:
    """Raise DataError for token files of `folder`, which this package has not made, with an id beyond the vocabulary.
    This reads all of them."""
    for name, tokens in zip((TRAIN, VALIDATION), corpus, strict=True):
        if not (folder / META).exists() and (largest := int(tokens.max(initial=0))) >= vocab_size:
            raise DataError(f"{folder / name}: token id {largest} is outside the vocabulary [0, {vocab_size})")


def fingerprint(tokens: NDArray[Any]) -> str:
    """A digest of the number of tokens, or of other numbers, and of 256 stretches of them: enough to notice others."""
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in np.linspace(0, max(0, len(tokens) - 64), 256).astype(np.int64).tolist():
        digest.update(tokens[start : start + 64].tobytes())
    return digest.hexdigest()


class Batches:
    """Endless batches (input_ids, targets), each (batch, length) int64 with targets shifted by one.

    An epoch cuts the tokens, as a ring, into windows of `length`, from a random token on, so that a token is not always
    seen at the same position. It visits every window once, in an order that is in memory (8 bytes a window). `position`
    counts the windows drawn so far, by all processes, and may be set, to continue where another run stopped. Process
    `rank` of `world` draws its rows of each batch, (batch / world, length), and reads no others.

    The random cut helps: over 8 epochs of Shakespeare (325,373 tokens) the validation loss of 2 blocks of width 64 was
    4.063, 4.069, 4.077 (seeds 0, 1, 2) with it and 4.081, 4.093, 4.112 without (`minigpt2 bench learning --n-layer 2
    --n-head 2 --n-embd 64 --steps 1160 --optimizer adamw --seeds 0 1 2`).
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
        self._ordered = -1

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
        return gather(self.tokens, [self._start(p) for p in range(start, start + self.share)], self.length)

    def _start(self, position: int) -> int:
        """The first token of the window at `position`."""
        epoch, index = divmod(position, self.windows)
        if epoch != self._ordered:
            rng = np.random.default_rng([self.seed, epoch])
            self._starts = rng.permutation(self.windows) * self.length + rng.integers(len(self.tokens))
            self._ordered = epoch
        return int(self._starts[index]) % len(self.tokens)


def gather(tokens: Tokens, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    """The windows that begin at token `starts` of the ring of tokens, as (input_ids, targets), each (len(starts),
    length) int64."""
    rows = np.add.outer(starts, np.arange(length + 1))
    both = torch.from_numpy(tokens.take(rows, mode="wrap").astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def in_order(tokens: Tokens, batch: int, length: int, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first windows of `tokens`, in order, in batches of at most `batch`, `most` of them; for evaluation."""
    windows = min((len(tokens) - 1) // length, batch * most)
    if windows < 1:
        raise DataError(f"{len(tokens)} validation tokens are too few for one window of {length}")
    for start in range(0, windows, batch):
        yield gather(tokens, [w * length for w in range(start, min(start + batch, windows))], length)
