"""The folder of a run, from the inside: it belongs to one process, and knows its settings, their changes and its data.

train_config.json has the settings as they are now. Beside them stand `changes`, each with the step from which it holds;
`finished`, the step of the last weights; the `tokens` that were made of a text, by their folder's name, and the
fingerprint of those for training; and where data and initial weights lie as seen from the run, so that all may move.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minigpt2.data.batches import DataError, fingerprint, is_token_folder, open_corpus, open_tokens
from minigpt2.data.prepare import TRAIN
from minigpt2.files import atomic_write
from minigpt2.run_folder import BEST, SETTINGS, SNAPSHOTS, Snapshot, SnapshotError, finished_step, newest
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.settings import APART, TrainConfig, changes, command
from minigpt2.training.state import check_readable
from minigpt2.weights import OFFICIAL, find_folder, weight_files

__all__ = [
    "Record",
    "check_changes",
    "claimed",
    "next_record",
    "note_changes",
    "read",
    "start_of",
    "token_folder",
    "write",
]

LOCK = ".lock"


@dataclass
class Record:
    """What train_config.json says."""

    config: TrainConfig
    changes: list[dict[str, Any]] = field(default_factory=list)
    finished: int | None = None
    """The step of the last weights, model.safetensors."""
    tokens: str | None = None
    """The folder of the tokens, in the run's, of data that was text."""
    fingerprint: str | None = None
    """Of the training tokens; see data.batches.fingerprint."""
    earlier: list[str] = field(default_factory=list)
    """Of those that the run read before --new-data."""
    tokenizer: str | None = None
    """The fingerprint of what made the tokens, if that is known."""
    init_fingerprint: str | None = None
    nearby: dict[str, str] = field(default_factory=dict)
    """Where --data and --init are as seen from the run folder."""


EXTRA = [f.name for f in dataclasses.fields(Record) if f.name != "config"]


def read(out: Path) -> Record | None:
    """The record of the run in a folder, with its paths where they are now; None where none was begun. Raises
    ValueError for one that cannot be read, or that is lost although there is more of a run."""
    path = out / SETTINGS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        names = {f.name for f in dataclasses.fields(TrainConfig)}
        settings = {name: value for name, value in stored.items() if name in names - APART | {"data", "init"}}
        extra = {name: stored[name] for name in EXTRA if name in stored}
        record = Record(TrainConfig(**settings), **extra)
    except (FileNotFoundError, NotADirectoryError):
        if holds_run(out):
            raise ValueError(f"{out} holds a run but no {SETTINGS}, without which it cannot go on") from None
        return None
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not the settings of a run: {error}") from None
    config = record.config
    data = None if config.data is None else _found(Path(config.data), out, record.nearby.get("data"))
    init = config.init
    if init is not None and init not in OFFICIAL:
        init = str(_found(Path(init), out, record.nearby.get("init")))
    record.config = dataclasses.replace(config, out=out, data=data, init=init)
    return record


def _found(stored: Path, out: Path, near: str | None) -> Path:
    """Where a path is now: where it was or, if it has moved with the run, where it is as seen from there."""
    return stored if stored.exists() or near is None or not (out / near).exists() else out / near


def write(out: Path, record: Record) -> None:
    """Write train_config.json, all or nothing."""
    config, nearby = record.config, dict(record.nearby)
    places = {"data": config.data, "init": config.init if Path(config.init or "").is_dir() and config.init else None}
    for name, place in places.items():
        if place is not None:
            with suppress(ValueError):  # on another drive
                nearby[name] = os.path.relpath(place, out)
    absolute = {name: str(Path(place).absolute()) for name, place in places.items() if place is not None}
    extra = {name: getattr(record, name) for name in EXTRA} | {"nearby": nearby}
    settings = {name: value for name, value in config.to_json().items() if name not in APART - {"data", "init"}}
    with atomic_write(out / SETTINGS) as path:
        path.write_text(json.dumps(settings | absolute | extra, indent=2) + "\n", encoding="utf-8")


def holds_run(out: Path) -> bool:
    """Whether a run was begun in a folder. One that was killed while its text was tokenised was not yet."""
    return any((out / name).exists() for name in (SETTINGS, "metrics.jsonl", SNAPSHOTS)) or has_weights(out)


def has_weights(out: Path) -> bool:
    """Whether there are weights beside the snapshots: the last ones or the best."""
    return finished_step(out) is not None or (out / BEST).exists()


@contextmanager
def claimed(out: Path | None) -> Iterator[Path]:
    """A run folder, made if it is not there and named by the time if it has no name, that no other process has while
    the block runs. One that was made here and in which the block began no run is removed, unless the block was
    interrupted. Raises ValueError if another process has it."""
    if out is None:
        out, created = _unique(), True
    else:
        try:
            out.mkdir(parents=True)
            created = True
        except FileExistsError:
            created = False
    with _locked(out):
        yield out
        if created and not holds_run(out):
            shutil.rmtree(out, ignore_errors=True)


def _unique() -> Path:
    """A new folder that no other process has, however many make one in the same second."""
    name, number = time.strftime("runs/%Y%m%d-%H%M%S"), 1
    while True:
        out = Path(name if number == 1 else f"{name}-{number}")
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return out


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock. That of the system ends with the process, whatever ends it; on a system that has none, a
    file is one. A file system that has none does without."""
    taken = ValueError(f"another process trains in {out}; wait for it or stop it, or choose another folder")
    try:
        import fcntl
    except ImportError:
        fcntl = None  # type: ignore[assignment]
    if fcntl is not None:
        with (out / LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise taken from None
            except OSError:
                pass  # a file system without locks
            yield
        return
    try:
        (out / LOCK).touch(exist_ok=False)
    except FileExistsError:
        raise ValueError(f"{taken}; if there is none, delete {out / LOCK}") from None
    try:
        yield
    finally:
        (out / LOCK).unlink()


def start_of(config: TrainConfig, record: Record | None, out: Path) -> tuple[Snapshot | None, list[str]]:
    """Where a run starts: the newest intact snapshot, or None, its beginning; and what to tell the user. Raises
    ValueError where it may not start: over another run, from damaged snapshots alone, or beyond its end."""
    if record is None:
        if holds_run(out):
            raise ValueError(f"--out {out} already holds a run; continue it with --resume, or choose another folder")
        return None, [f"{out} holds no run yet: beginning one"] if config.resume else []
    found, passed_over = newest(out / SNAPSHOTS)
    if found is not None:
        check_readable(found)
        if config.max_steps < found.step:
            raise ValueError(
                f"--max-steps must be at least {found.step}, which the run has done, got {config.max_steps}"
            )
        return found, [*(f"passed over: {reason}" for reason in passed_over), f"resuming from {found.path}"]
    weights = out if finished_step(out) is not None else out / BEST
    new = (
        f"; begin a new run from its weights: {command('--init', weights, '--out', 'NEW')}" if has_weights(out) else ""
    )
    if passed_over:
        raise SnapshotError(f"{out / SNAPSHOTS} has no intact snapshot: {'; '.join(passed_over)}{new}")
    if new:
        raise ValueError(f"{out} has weights, but no snapshot to go on from{new}")
    return None, ["resuming from the beginning: the run had no snapshot yet"]


def next_record(
    config: TrainConfig, before: Record | None, out: Path, place: Path, known: str, made_by: str | None
) -> Record:
    """The record of a run with these settings and with the tokens in `place`, whose fingerprint is `known`, and that of
    their tokenizer `made_by`."""
    tokens = place.name if place.parent == out and not _same_place(place, config.data) else None
    if before is None:
        read_once = weights_fingerprint(config.init)
        return Record(config, tokens=tokens, fingerprint=known, tokenizer=made_by, init_fingerprint=read_once)
    earlier = [*before.earlier, before.fingerprint] if before.fingerprint not in (known, None) else before.earlier
    return dataclasses.replace(before, config=config, tokens=tokens, fingerprint=known, earlier=earlier)


def note_changes(record: Record, before: Record, step: int) -> dict[str, tuple[Any, Any]]:
    """Add to a record what is otherwise in it than before, from a step on, and return it; see settings.changes."""
    differ = changes(before.config, record.config)
    if record.fingerprint != before.fingerprint:
        differ["data"] = (str(before.config.data), str(record.config.data))
    if differ:
        record.changes = [*before.changes, {"step": step} | {name: list(pair) for name, pair in differ.items()}]
    return differ


def token_folder(config: TrainConfig, out: Path, record: Record | None, tokenizer: Tokenizer | None) -> Path:
    """The folder with the tokens of a run: of its data or, if that was text, in the run folder, where they are made
    first. One that goes on has those that it had, wherever they are now, unless --new-data asks for others. Raises
    DataError if there are none, or others."""
    if record is None:
        return _made(config, out / "tokens", tokenizer, renew=True)
    known, before = record.fingerprint, record.config.data
    given = config.new_data or not _same_place(config.data, before)
    if not given:
        place = out / record.tokens if record.tokens else Path(before or "")
        if is_token_folder(place):
            if _fingerprint(place) == known:
                return place
            raise DataError(
                f"{place}: the training tokens are not the same as those that the run has read; {_choice(out)}"
            )
        if not record.tokens:
            raise DataError(f"{place} is no folder of tokens any more; say with --data where they are now")
        return _known(_made(config, place, tokenizer), known, out)
    if is_token_folder(config.data):
        place = Path(config.data or "")
        return place if config.new_data else _known(place, known, out)
    place = out / f"tokens-{len(record.earlier) + 2}"
    shutil.rmtree(place, ignore_errors=True)  # what a killed process left there may be of older text
    try:
        made = _made(config, place, tokenizer)
        if _fingerprint(made) == known and record.tokens and is_token_folder(out / record.tokens):
            shutil.rmtree(made)
            return out / record.tokens
        return made if config.new_data else _known(made, known, out)
    except DataError:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _made(config: TrainConfig, place: Path, tokenizer: Tokenizer | None, *, renew: bool = False) -> Path:
    """The tokens of --data: its own, or made in `place`; with `renew`, in place of those of other text."""
    if is_token_folder(config.data):
        return Path(config.data or "")
    open_corpus(config.data, place, config, renew=renew, tokenizer=tokenizer, progress=True)
    return place


def _known(place: Path, known: str | None, out: Path) -> Path:
    if _fingerprint(place) != known:
        raise DataError(f"{place}: the training tokens are not the same as those that the run has read; {_choice(out)}")
    return place


def _choice(out: Path) -> str:
    more = command("--out", out, "--resume", "--data", "DATA", "--new-data")
    return f"to go on with these, from a new epoch: {more}"


def _fingerprint(place: Path) -> str:
    return fingerprint(open_tokens(place / TRAIN))


def _same_place(a: Path | None, b: Path | None) -> bool:
    return a == b or (a is not None and b is not None and os.path.realpath(a) == os.path.realpath(b))


def weights_fingerprint(init: str | None) -> str | None:
    """A digest of initial weights: enough to notice others."""
    if init is None:
        return None
    files = weight_files(find_folder(init))
    return fingerprint(np.memmap(files[0], dtype=np.uint8, mode="r"))


def check_changes(config: TrainConfig, record: Record | None) -> None:
    """Raise ValueError, with what to do instead, if a run that goes on is given settings that it cannot have, other
    initial weights among them: those are read once, when it begins."""
    if record is None:
        return
    changes(record.config, config)
    if (
        config.data is not None
        and not config.data.exists()
        and (record.tokens is None or config.data != record.config.data)
    ):
        raise DataError(f"{config.data}: no such file or folder; say with --data where the data of the run is now")
    now, before = config.init, record.config.init
    if now == before or (now is not None and before is not None and _same_place(Path(now), Path(before))):
        return
    moved = now is not None and now not in OFFICIAL and before is not None
    if moved and (
        (not Path(now or "").exists() and Path(now or "").name == Path(before or "").name)
        or weights_fingerprint(now) == record.init_fingerprint
    ):
        return  # it is not read again in any case
    new = command("--init", now, "--out", "NEW") if now is not None else command("--out", "NEW")
    raise ValueError(
        f"--init {now} cannot change in a run, which began with {before or 'a fresh model'} and goes on from its own "
        f"weights; leave it out, or begin a new run: {new} ..."
    )
