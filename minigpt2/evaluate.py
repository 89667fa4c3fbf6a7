"""How well a model predicts a text of any length, by sliding windows."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt2.data.batches import DataError, Tokens, is_token_folder, open_tokens
from minigpt2.data.documents import TextOptions
from minigpt2.data.prepare import VALIDATION, check_tokenizer, tokenise
from minigpt2.generate import NonFiniteError, evaluation_mode, nonfinite
from minigpt2.loss import linear_cross_entropy
from minigpt2.model import GPT2
from minigpt2.progress import Progress
from minigpt2.tokenizer import Tokenizer, get_tokenizer

__all__ = ["Evaluation", "evaluate", "tokens_of"]


class Evaluation(NamedTuple):
    """What `evaluate` finds."""

    loss: float
    """Mean over the tokens, in nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """The loss of all tokens in bits, per byte of text; <|endoftext|> has a loss and no bytes."""
    tokens: int
    """Tokens scored: all of them, once each."""
    bytes: int
    """Bytes of UTF-8 text they stand for."""


class Window(NamedTuple):
    """The tokens `start` to `stop - 1` are predicted, each from those before it and the one before `start`; the last
    `scored` of them count."""

    start: int
    stop: int
    scored: int


def windows(n: int, length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` over n tokens, each `stride` after the last, that score every token once."""
    start, stop = 0, min(length, n)
    yield Window(start, stop, stop)
    while stop < n:
        start, before = start + stride, stop
        stop = min(start + length, n)
        yield Window(start, stop, stop - before)


@torch.no_grad()
def evaluate(
    model: GPT2,
    tokens: Tokens,
    *,
    length: int | None = None,
    stride: int | None = None,
    batch: int = 8,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score every one of `tokens` (integers, (n,), which may be mapped from disk) once, the first after <|endoftext|>.
    They are those of `tokenizer`, by default OpenAI's.

    Windows of `length` tokens (default: the context length) move by `stride` (default: half of it), so a token is
    predicted from at least length - stride tokens where there are as many; stride 1 gives each all the context the
    model can take. `batch` windows run at a time, in memory that does not depend on n. Draws no random numbers, and
    leaves each module in its mode. Raises ValueError for a length or stride that does not fit, NonFiniteError for
    weights or a loss that are not finite, DataError when there are no tokens.
    """
    length = model.config.n_positions if length is None else length
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length <= model.config.n_positions:
        raise ValueError(
            f"stride and length must be 1 <= stride <= length <= {model.config.n_positions}, the context length; "
            f"got stride {stride}, length {length}"
        )
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
    if not len(tokens):
        raise DataError("there are no tokens to evaluate")
    if (problem := nonfinite(model)) is not None:
        raise NonFiniteError(problem)
    tokenizer = tokenizer or get_tokenizer()
    sizes, separator = bytes_of_tokens(tokenizer), tokenizer.separator
    nats, n_bytes = 0.0, 0
    with (
        evaluation_mode(model),
        Progress(total=len(tokens), unit=" tokens", unit_scale=True, desc="evaluating", disable=not progress) as bar,
    ):
        for group in _alike(windows(len(tokens), length, stride), batch):
            losses = _losses(model, tokens, group, separator)
            nats += losses.double().sum().item()
            if not math.isfinite(nats):
                raise NonFiniteError(
                    f"the loss is {nats}: with weights that are finite, the model overflows {losses.dtype}"
                )
            for window in group:
                scored = tokens[window.stop - window.scored : window.stop]
                n_bytes += int(sizes[np.minimum(scored, len(sizes) - 1)].sum())
            bar.update(sum(window.scored for window in group))
    loss = nats / len(tokens)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits = nats / math.log(2) / n_bytes if n_bytes else math.nan
    return Evaluation(loss, perplexity, bits, len(tokens), n_bytes)


def _alike(all_windows: Iterator[Window], batch: int) -> Iterator[list[Window]]:
    """Up to `batch` windows in a row that have one shape."""
    group: list[Window] = []
    for window in all_windows:
        shape = (window.stop - window.start, window.scored)
        if group and (len(group) == batch or shape != (group[0].stop - group[0].start, group[0].scored)):
            yield group
            group = []
        group.append(window)
    yield group


def _losses(model: GPT2, tokens: Tokens, group: list[Window], separator: int) -> Tensor:
    """The losses (B, scored) of the tokens that count in windows of one shape."""
    device, scored = model.wte.weight.device, group[0].scored
    # The token before each window, and the window.
    rows = [np.append(tokens[w.start - 1] if w.start else separator, tokens[w.start : w.stop]) for w in group]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)  # (B, 1 + T)
    hidden, head = model.hidden(ids[:, :-1])
    hidden = hidden[:, -scored:]  # (B, scored, C): the rest needs no head
    return linear_cross_entropy(hidden, head, ids[:, -scored:], reduction="none")


def bytes_of_tokens(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The length in bytes of the text that each token id stands for, (n_vocab + 1,); 0 for the end-of-text token, and
    for the last: ids that the tokenizer lacks."""
    sizes = [0 if i == tokenizer.end_of_text else len(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab)]
    return np.array([*sizes, 0], dtype=np.int64)


@contextmanager
def tokens_of(
    path: str | Path,
    text: TextOptions = TextOptions(),  # noqa: B008 (frozen)
    *,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
) -> Iterator[Tokens]:
    """The tokens of a token file (.bin), the validation tokens of a folder of token files, or those of text (see
    prepare.prepare) with <|endoftext|> between documents. They are mapped from disk: a text of any length goes through
    a temporary file. `tokenizer` is OpenAI's by default. Raises TokenizerError for tokens of another."""
    tokenizer = tokenizer or get_tokenizer()
    if Path(path).suffix == ".bin":
        check_tokenizer(Path(path).parent, tokenizer)
        yield open_tokens(path)
        return
    if is_token_folder(path):
        check_tokenizer(Path(path), tokenizer)
        yield open_tokens(Path(path) / VALIDATION)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not tokenise(path, Path(folder), text, tokenizer=tokenizer, progress=progress):
            raise DataError(f"{path}: no text found")
        yield open_tokens(Path(folder) / "tokens.bin")[:-1]
