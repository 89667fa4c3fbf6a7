"""Text to token files: in parallel, resumable, and in memory that does not grow with the corpus.

A folder of token files holds `train.bin` and `val.bin`: token ids as little-endian uint16, nothing else, with
`<|endoftext|>` after each document; and `tokens.json`, which says what they were made of. Whole documents go to one
file or the other, by a digest of their text. Beside them lie the files of a tokenizer that is not OpenAI's.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from minigpt2.data.documents import DataError, Piece, read_pieces, text_files
from minigpt2.files import atomic_write, errors_name, flush
from minigpt2.progress import Progress
from minigpt2.tokenizer import Tokenizer, TokenizerError, get_tokenizer

__all__ = ["META", "TRAIN", "VALIDATION", "check_tokenizer", "prepare", "tokenise"]

TRAIN, VALIDATION, META = "train.bin", "val.bin", "tokens.json"
FORMAT = "minigpt2 tokens 1"
JOURNAL_EVERY = 1 << 22
"""Tokens between two entries in the journal, from which an interrupted run continues."""

SMALL = 1 << 25
"""Bytes of text that are tokenised sooner than processes for it have started."""

BUCKETS = 1 << 16
_DOCUMENT = np.dtype([("bucket", "<u2"), ("tokens", "<u8")])
_TOKEN = np.dtype("<u2")


@dataclass
class Journal:
    """How far tokenising has come."""

    request: dict[str, Any]
    file: int = 0
    offset: int = 0
    seen: str = ""
    bytes: int = 0
    tokens: int = 0
    documents: int = 0
    open_tokens: int = 0
    """Tokens of a document whose end was not read yet."""
    open_bucket: int = 0


def prepare(
    data: str | Path | None,
    out: str | Path,
    *,
    validation_fraction: float = 0.05,
    separator: str | None = None,
    workers: int | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise the documents under `data` (see documents.read_pieces) into the folder `out`, and split them.

    Validation gets documents in the order of a digest of their text until it has `validation_fraction` of the tokens;
    those longer than that come last, the shortest first, and the longest of all stays for training. A corpus of one
    document gives its end. Interrupted, it continues; a finished folder is left as it is. `workers`
    processes (default: one a CPU) do the work of a corpus that is not small; a script that calls this needs the usual
    `if __name__ == "__main__"`. `tokenizer` is OpenAI's by default. Returns what tokens.json says: counts of tokens and
    documents.

    Raises DataError when there is no text or when `out` holds tokens of something else, TokenizerError when it holds
    those of another tokenizer.
    """
    tokenizer = tokenizer or get_tokenizer()
    if tokenizer.n_vocab > 1 << 16:
        raise TokenizerError(f"token files have ids below 65536, the tokenizer up to {tokenizer.n_vocab - 1}")
    if not 0 <= validation_fraction < 1:
        raise DataError(f"the validation fraction must be in [0, 1), got {validation_fraction}")
    if separator == "":
        raise DataError("the separator of documents must not be empty")
    text_files(data)  # raises before anything is written
    out, source = Path(out), None if data is None else str(data)
    request = {"data": source, "validation_fraction": validation_fraction, "separator": separator}
    if (out / META).exists():
        check_tokenizer(out, tokenizer)
        meta: dict[str, Any] = json.loads((out / META).read_text(encoding="utf-8"))
        if meta.get("request") != request:
            raise DataError(f"{out} holds tokens of {meta.get('request')}; choose another folder")
        return meta
    for name in (TRAIN, VALIDATION):
        if (out / name).exists() and not (out / ".part").exists():
            raise DataError(f"{out / name} is there already; choose another folder")
    part = out / ".part"
    part.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"separator": separator, "workers": workers, "progress": progress}
    documents = tokenise(data, part, request=request, tokenizer=tokenizer, **options)
    if not documents:
        shutil.rmtree(part)
        raise DataError(f"{data or 'standard library'}: no text found")
    counts = _split(part, out, validation_fraction)
    meta = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "request": request, "documents": documents, **counts}
    if tokenizer.fingerprint != get_tokenizer().fingerprint:
        tokenizer.save(out)
    with atomic_write(out / META) as file:
        file.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(part, ignore_errors=True)
    return meta


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise TokenizerError if the folder's tokens.json says that its tokens were made by another tokenizer. Where it
    does not say, they were made by OpenAI's; token files without a tokens.json are anybody's."""
    if (folder / META).exists():
        made_by = json.loads((folder / META).read_text(encoding="utf-8")).get("tokenizer", get_tokenizer().fingerprint)
        if made_by != tokenizer.fingerprint:
            other = "OpenAI's tokenizer" if made_by == get_tokenizer().fingerprint else f"the tokenizer {made_by}"
            raise TokenizerError(
                f"{folder} holds tokens of {other}, not of {tokenizer}; make others in another folder, with "
                "minigpt2 prepare --tokenizer and the folder of the model"
            )


def tokenise(
    data: str | Path | None,
    part: Path,
    *,
    request: dict[str, Any],
    tokenizer: Tokenizer,
    separator: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> int:
    """Write the tokens of every document under `data`, in order, to `part`/tokens.bin, and to `part`/documents.bin the
    bucket and length of each. Continues from the journal in `part`. Returns the number of documents."""
    request = request | {"tokenizer": tokenizer.fingerprint}
    journal, end = _read_journal(part, request), tokenizer.separator
    if journal.file or journal.offset:
        again = next(read_pieces(data, separator, journal.file, 0), None)
        if again is None or again.seen != journal.seen:
            tqdm.write(f"{data}: the files have changed since {part} was begun; starting over")
            journal = Journal(request)
    workers = workers or os.cpu_count() or 1
    total = sum(path.stat().st_size for path in text_files(data))
    counted: dict[str, Any] = {"total": total, "initial": journal.bytes, "unit": "B", "unit_scale": True}
    bar = Progress(**counted, desc="tokenising", disable=not progress)
    pending: deque[tuple[Piece, int, Future[NDArray[Any]]]] = deque()
    with (
        bar,
        errors_name(part),
        _opened_at(part / "tokens.bin", journal.tokens * _TOKEN.itemsize) as tokens,
        _opened_at(part / "documents.bin", journal.documents * _DOCUMENT.itemsize) as index,
        _executor(workers if total - journal.bytes > SMALL else 1, tokenizer) as pool,
    ):
        written = journal.tokens

        def take() -> None:
            nonlocal written
            piece, bucket, future = pending.popleft()
            _append(journal, tokens, index, piece, bucket, future.result(), end)
            bar.update(journal.bytes - bar.n)
            if journal.tokens - written >= JOURNAL_EVERY:
                _write_journal(part, journal, tokens, index)
                written = journal.tokens

        for piece in read_pieces(data, separator, journal.file, journal.offset):
            pending.append((piece._replace(text=""), _bucket(piece.text), pool.submit(_encode, piece.text)))
            if len(pending) >= 2 * workers:  # or the reader would run ahead and hold the corpus
                take()
        while pending:
            take()
        _write_journal(part, journal, tokens, index)
        bar.finish()
    return journal.documents


def _executor(workers: int, tokenizer: Tokenizer) -> Executor:
    """Processes, since the encoder holds Python's lock; they are started afresh, as torch's threads do not survive a
    fork."""
    if workers == 1:
        return ThreadPoolExecutor(1, initializer=_start_worker, initargs=(tokenizer,))
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,))


_worker = threading.local()


def _start_worker(tokenizer: Tokenizer) -> None:
    _worker.tokenizer = tokenizer
    if threading.current_thread() is threading.main_thread():  # of a process
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one is interrupted, and ends it


def _encode(text: str) -> NDArray[Any]:
    return _worker.tokenizer.encode_document(text).astype(_TOKEN)


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big")


def _append(
    journal: Journal, tokens: BinaryIO, index: BinaryIO, piece: Piece, bucket: int, ids: NDArray[Any], end: int
) -> None:
    """Add a piece to the files and to the journal. A document has the bucket of its first piece, and is followed by the
    token `end`; an empty one is left out."""
    journal.bytes += piece.offset - (journal.offset if piece.file == journal.file else 0)
    journal.file, journal.offset, journal.seen = piece.file, piece.offset, piece.seen
    if not len(ids) and not journal.open_tokens:
        return
    if not journal.open_tokens:
        journal.open_bucket = bucket
    if piece.ends:
        ids = np.append(ids, _TOKEN.type(end))
    tokens.write(ids.tobytes())
    journal.tokens += len(ids)
    journal.open_tokens += len(ids)
    if piece.ends:
        index.write(np.array([(journal.open_bucket, journal.open_tokens)], dtype=_DOCUMENT).tobytes())
        journal.documents += 1
        journal.open_tokens = 0


def _read_journal(part: Path, request: dict[str, Any]) -> Journal:
    try:
        journal = Journal(**json.loads((part / "journal.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Journal(request)
    except (ValueError, TypeError) as error:
        raise DataError(f"{part / 'journal.json'}: {error}; delete {part} to start over") from None
    if journal.request != request:
        raise DataError(f"{part} was begun for {journal.request}; delete it or choose another folder")
    return journal


def _write_journal(part: Path, journal: Journal, *files: BinaryIO) -> None:
    for file in files:  # what the journal counts must be on disk before the journal is
        file.flush()
        flush(Path(file.name))
    with atomic_write(part / "journal.json") as path:
        path.write_text(json.dumps(asdict(journal)), encoding="utf-8")


def _opened_at(path: Path, size: int) -> BinaryIO:
    """The file, opened for writing, cut back to `size` bytes."""
    file = path.open("ab")
    if file.tell() < size:  # a disk that lost what it had promised to keep
        raise DataError(f"{path}: {file.tell()} bytes, the journal says {size}; delete {path.parent} to start over")
    file.truncate(size)
    return file


def _split(part: Path, out: Path, fraction: float) -> dict[str, int]:
    """Write train.bin and val.bin from the files of `tokenise`; return the tokens in each."""
    lengths = sum(int(block["tokens"].sum()) for block in _documents(part))
    wanted = int(lengths * fraction)
    limit, longest, n_documents = _choose(part, wanted)
    tokens = np.memmap(part / "tokens.bin", dtype=_TOKEN, mode="r")
    end = len(tokens) - (wanted if n_documents == 1 else 0)  # a single document gives validation its last tokens

    def write(path: Path, validation: bool) -> int:
        position = 0
        with atomic_write(path) as temporary:
            with temporary.open("wb") as file:  # closed before it is renamed
                for block in _documents(part):
                    for bucket, length in block.tolist():
                        chosen = bucket < limit if length <= wanted else length < longest
                        if chosen == validation:
                            file.write(tokens[position : min(position + length, end)].data)
                        position += length
                if validation:
                    file.write(tokens[end:].data)
            return temporary.stat().st_size // _TOKEN.itemsize

    return {"train_tokens": write(out / TRAIN, False), "validation_tokens": write(out / VALIDATION, True)}


def _choose(part: Path, wanted: int) -> tuple[int, int, int]:
    """Which documents give validation its tokens: of those that have at most `wanted`, all in a bucket below the first
    number returned; of the longer ones, all shorter than the second. The third is the number of documents.

    Counting by buckets takes the documents in the order of a digest of their text in memory of a fixed size; of the
    longer ones there are at most 1 / validation_fraction.
    """
    weight, longer, n_documents = np.zeros(BUCKETS, dtype=np.int64), np.empty(0, dtype=np.int64), 0
    for block in _documents(part):
        lengths = block["tokens"].astype(np.int64)
        short = lengths <= wanted
        np.add.at(weight, block["bucket"][short], lengths[short])
        if wanted:
            longer = np.append(longer, lengths[~short])
        n_documents += len(block)
    buckets, long_lengths = np.flatnonzero(weight), np.unique(longer)
    # In the order in which they are taken; the last stays in training, which would have nothing otherwise.
    groups = [int(weight[bucket]) for bucket in buckets] + [int(longer[longer == n].sum()) for n in long_lengths]
    taken = np.concatenate([[0], np.cumsum(groups[:-1], dtype=np.int64)])
    n = min(int(np.searchsorted(taken, wanted)), len(taken) - 1)
    limit = int(buckets[n]) if n < len(buckets) else BUCKETS
    longest = int(long_lengths[n - len(buckets)]) if n > len(buckets) else 0
    return limit, longest, n_documents


def _documents(part: Path) -> Any:
    """The records of documents.bin, in blocks."""
    with (part / "documents.bin").open("rb") as file:
        while block := file.read(BUCKETS * _DOCUMENT.itemsize):
            yield np.frombuffer(block, dtype=_DOCUMENT)
