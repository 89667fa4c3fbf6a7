"""Text to token files: in parallel, resumable, and in memory that does not grow with the corpus.

A folder of token files holds `train.bin` and `val.bin`: token ids as little-endian uint16, nothing else, with
`<|endoftext|>` after each document; `tokens.json`, which says what they were made of; and `files.jsonl`, the list of
the files that they were made of. Beside them lie the files of a tokenizer that is not OpenAI's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from minigpt2.data.documents import DataError, TextOptions, check_options
from minigpt2.data.sources import Piece, Survey, changes, read_list, read_pieces, root_of, survey
from minigpt2.data.split import DOCUMENT, TOKEN, split
from minigpt2.files import atomic_write, errors_name, flush, removed_on_error
from minigpt2.progress import Progress
from minigpt2.tokenizer import Tokenizer, TokenizerError, get_tokenizer
from minigpt2.tokenizer_files import FILES as TOKENIZER_FILES

__all__ = ["META", "TRAIN", "VALIDATION", "check_tokenizer", "prepare", "tokenise"]

TRAIN, VALIDATION, META = "train.bin", "val.bin", "tokens.json"
FILES, JOURNAL = "files.jsonl", "journal.json"
FORMAT = "minigpt2 tokens 1"
JOURNAL_EVERY = 1 << 22
"""Tokens between two entries in the journal, from which an interrupted run continues."""

SMALL = 1 << 25
"""Bytes of text that are tokenised sooner than processes for it have started."""

SEPARATOR = "<|endoftext|>"


@dataclass
class Journal:
    """How far tokenising has come."""

    request: dict[str, Any]
    file: int = 0
    offset: int = 0
    bytes: int = 0
    tokens: int = 0
    documents: int = 0
    open_tokens: int = 0
    """Tokens of a document whose end was not read yet."""
    open_bucket: int = 0


def prepare(
    data: str | Path | None,
    out: str | Path,
    text: TextOptions = TextOptions(),  # noqa: B008 (frozen)
    *,
    validation_fraction: float = 0.05,
    renew: bool = False,
    workers: int | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise the documents under `data` into the folder `out`, and split them (see split.split).

    `data` is a file, a pipe, or a folder, in which files that are not text are left out (see sources.survey); None
    means the standard library's sources. Interrupted, it continues; a finished folder is left as it is while the files
    and the settings are what they were, and written anew after that only with `renew`. `workers` processes (default:
    one a CPU) do the work of a corpus that is not small; a script that calls this needs the usual `if __name__ ==
    "__main__"`. With `progress`, a line says what was read and a bar how far it is. Returns what tokens.json says:
    counts of files, documents and tokens. `tokenizer` is OpenAI's by default.

    Raises DataError when there is no text, when too much of it is left out, or when `out` holds other tokens, and
    TokenizerError when it holds those of another tokenizer.
    """
    tokenizer = tokenizer or get_tokenizer()
    if tokenizer.n_vocab > 1 << 16:
        raise TokenizerError(f"token files have ids below 65536, the tokenizer up to {tokenizer.n_vocab - 1}")
    if not 0 <= validation_fraction < 1:
        raise DataError(f"the validation fraction must be in [0, 1), got {validation_fraction}")
    check_options(text)
    out, part, other_tokenizer = Path(out), Path(out, ".part"), False
    settings = {name: getattr(text, name) for name in ("separator", "encoding", "field")}
    request = {"validation_fraction": validation_fraction, **settings}
    if (out / META).exists():
        meta: dict[str, Any] = json.loads((out / META).read_text(encoding="utf-8"))
        if not renew:
            check_tokenizer(out, tokenizer)
        other_tokenizer = _made_by(meta) != tokenizer.fingerprint
        changed = "" if other_tokenizer else _changes(meta, request, data, out, text)
        if not changed and not other_tokenizer:
            return meta
        if not renew:
            what = f"{out} holds tokens of {meta.get('data') or 'other text'}, and since then: {changed}"
            raise DataError(f"{what}; --renew replaces them, another --out keeps them")
    for name in (TRAIN, VALIDATION):
        if (out / name).exists() and not (out / META).exists() and not part.exists():
            raise DataError(f"{out / name} is there already; choose another folder")
    with removed_on_error(out), removed_on_error(part):
        part.mkdir(parents=True, exist_ok=True)
        begun = request | {"tokenizer": tokenizer.fingerprint}
        journal = _read_journal(part, begun, renew=renew)
        found, unchanged = _survey(data, text, part, journal, progress=progress)
    if not unchanged:
        tqdm.write(f"{data}: the files have changed since {part} was begun; starting over")
        journal = Journal(begun)
    if progress and (data is None or Path(data).is_dir()):
        tqdm.write(found.line())
    documents = _tokenise(data, part, text, found, journal, tokenizer, workers=workers, progress=progress)
    if not documents:
        shutil.rmtree(part)
        with suppress(OSError):
            out.rmdir()
        raise DataError(f"{data}: no text found")
    if other_tokenizer:
        for name in TOKENIZER_FILES:
            (out / name).unlink(missing_ok=True)
    (out / META).unlink(missing_ok=True)  # from here on `out` is unfinished
    counts = split(part, out / TRAIN, out / VALIDATION, validation_fraction, tokenizer.separator)
    with atomic_write(out / FILES) as file:
        shutil.copyfile(part / FILES, file)
    origin = {"data": None if data is None else str(data), "files": found.files, "left_out": dict(found.left_out)}
    made_by = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "request": request}
    meta = {**made_by, **origin, "documents": documents, **counts}
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
        made_by = _made_by(json.loads((folder / META).read_text(encoding="utf-8")))
        if made_by != tokenizer.fingerprint:
            other = "OpenAI's tokenizer" if made_by == get_tokenizer().fingerprint else f"the tokenizer {made_by}"
            raise TokenizerError(
                f"{folder} holds tokens of {other}, not of {tokenizer}; make others in another folder, with "
                "minigpt2 prepare --tokenizer and the folder of the model"
            )


def _made_by(meta: dict[str, Any]) -> str:
    """The fingerprint of the tokenizer that a tokens.json names."""
    return str(meta.get("tokenizer", get_tokenizer().fingerprint))


def _changes(
    meta: dict[str, Any], request: dict[str, Any], data: str | Path | None, out: Path, text: TextOptions
) -> str:
    """In words, how what is asked for differs from what the tokens in `out` were made of; empty if it does not."""
    made = meta.get("request") or {}
    other = [
        f"{name} {value!r} instead of {made.get(name)!r}" for name, value in request.items() if made.get(name) != value
    ]
    if other:
        return ", ".join(other)
    if not (out / FILES).exists():
        return f"no {FILES} in it tells whether the files are the same"
    with tempfile.TemporaryDirectory() as folder:
        survey(data, text, Path(folder, FILES), read_list(out / FILES))
        return changes(read_list(out / FILES), read_list(Path(folder, FILES)))


def _survey(
    data: str | Path | None, text: TextOptions, part: Path, journal: Journal, *, progress: bool
) -> tuple[Survey, bool]:
    """What is under `data`, with the list of its files in `part`; and whether those that the journal counts are what
    they were."""
    new, old = part / f"{FILES}.new", part / FILES
    with errors_name(part):
        found = survey(data, text, new, read_list(old), progress=progress)
    n = journal.file + 1 if journal.offset else journal.file
    before, now = (itertools.islice(read_list(path), n) for path in (old, new))
    unchanged = not n or (found.bytes is not None and not changes(before, now))
    if not unchanged:  # before the new list is there, which the old journal does not count
        (part / JOURNAL).unlink()
    new.replace(old)
    return found, unchanged


def tokenise(
    data: str | Path, part: Path, text: TextOptions, *, tokenizer: Tokenizer | None = None, progress: bool = False
) -> int:
    """Write the tokens of every document under `data`, in order, to `part`/tokens.bin. Returns the number of
    documents."""
    check_options(text)
    found = survey(data, text, part / FILES, progress=progress)
    if progress and Path(data).is_dir():
        tqdm.write(found.line())
    return _tokenise(data, part, text, found, Journal({}), tokenizer or get_tokenizer(), progress=progress)


def _tokenise(
    data: str | Path | None,
    part: Path,
    text: TextOptions,
    found: Survey,
    journal: Journal,
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    progress: bool,
) -> int:
    """Write the tokens of the files that the survey found to `part`/tokens.bin, and to `part`/documents.bin the bucket
    and length of each document, from where the journal is on. Returns the number of documents."""
    workers = workers or os.cpu_count() or 1
    counted: dict[str, Any] = {"total": found.bytes, "initial": journal.bytes, "unit": "B", "unit_scale": True}
    bar = Progress(**counted, desc="tokenising", disable=not progress)
    pending: deque[tuple[Piece, int, Future[NDArray[Any]]]] = deque()
    with (
        bar,
        errors_name(part),
        _opened_at(part / "tokens.bin", journal.tokens * TOKEN.itemsize) as tokens,
        _opened_at(part / "documents.bin", journal.documents * DOCUMENT.itemsize) as index,
        _executor(workers if found.bytes is None or found.bytes - journal.bytes > SMALL else 1, tokenizer) as pool,
    ):
        written, told = journal.tokens, text.separator == SEPARATOR

        def take() -> None:
            nonlocal written
            piece, bucket, future = pending.popleft()
            _append(journal, tokens, index, piece, bucket, future.result(), tokenizer.separator)
            bar.update(journal.bytes - bar.n)
            if journal.tokens - written >= JOURNAL_EVERY:
                _write_journal(part, journal, tokens, index)
                written = journal.tokens

        for piece in read_pieces(root_of(data), read_list(part / FILES), text, journal.file, journal.offset):
            if not told and SEPARATOR in piece.text:
                told = True
                if progress:
                    tqdm.write(f"{SEPARATOR} is in the text, and read as text; --separator '{SEPARATOR}' cuts there")
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
    return _worker.tokenizer.encode_document(text).astype(TOKEN)


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big")


def _append(
    journal: Journal, tokens: BinaryIO, index: BinaryIO, piece: Piece, bucket: int, ids: NDArray[Any], end: int
) -> None:
    """Add a piece to the files and to the journal. A document has the bucket of its first piece, and is followed by the
    token `end`; an empty one is left out."""
    journal.bytes += piece.offset - (journal.offset if piece.file == journal.file else 0)
    journal.file, journal.offset = piece.file, piece.offset
    if not len(ids) and not journal.open_tokens:
        return
    if not journal.open_tokens:
        journal.open_bucket = bucket
    if piece.ends:
        ids = np.append(ids, TOKEN.type(end))
    tokens.write(ids.tobytes())
    journal.tokens += len(ids)
    journal.open_tokens += len(ids)
    if piece.ends:
        index.write(np.array([(journal.open_bucket, journal.open_tokens)], dtype=DOCUMENT).tobytes())
        journal.documents += 1
        journal.open_tokens = 0


def _read_journal(part: Path, request: dict[str, Any], *, renew: bool) -> Journal:
    """How far an interrupted `prepare` came. What is left of one without a journal is deleted, as its list of files may
    be of other settings; with `renew`, so is what is left of one with other settings."""
    try:
        journal = Journal(**json.loads((part / JOURNAL).read_text(encoding="utf-8")))
        if journal.request == request:
            return journal
        if not renew:
            raise DataError(f"{part} was begun for {journal.request}; delete it or choose another folder")
    except FileNotFoundError:
        pass
    except (ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{part / JOURNAL}: {error}; delete {part} to start over") from None
    for path in part.iterdir():
        path.unlink()
    return Journal(request)


def _write_journal(part: Path, journal: Journal, *files: BinaryIO) -> None:
    for file in files:  # what the journal counts must be on disk before the journal is
        file.flush()
        flush(Path(file.name))
    with atomic_write(part / JOURNAL) as path:
        path.write_text(json.dumps(asdict(journal)), encoding="utf-8")


def _opened_at(path: Path, size: int) -> BinaryIO:
    """The file, opened for writing, cut back to `size` bytes."""
    file = path.open("ab")
    if file.tell() < size:  # a disk that lost what it had promised to keep
        raise DataError(f"{path}: {file.tell()} bytes, the journal says {size}; delete {path.parent} to start over")
    file.truncate(size)
    return file
