"""A run folder as others see it: its snapshots, and which of its weights to use. Knows nothing of training."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt2.files import sha256_of

__all__ = [
    "SETTINGS",
    "SNAPSHOT_WEIGHTS",
    "Snapshot",
    "SnapshotError",
    "candidates",
    "newest",
    "verified",
    "weights_of",
]

SETTINGS, SNAPSHOTS, BEST = "train_config.json", "snapshots", "best"
SNAPSHOT_WEIGHTS = "weights.safetensors"
FORMAT = "minigpt2 snapshot 1"
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})")


class SnapshotError(ValueError):
    """A snapshot that cannot be written, is damaged, or does not fit. Names the file and what is wrong with it."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot whose digests were verified."""

    path: Path
    step: int
    state: dict[str, Any]
    """What was saved as `state`: JSON values."""

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group, on the CPU, in memory of their own. Raises SnapshotError where there are none."""
        try:
            with safe_open(self.path / f"{group}.safetensors", framework="pt") as file:
                # clone: a view of the mapped file lies at any address, and the rounding of some CPU kernels depends on
                # the alignment of their operands.
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise SnapshotError(f"{self.path / group}.safetensors: {error}") from None


def weights_of(folder: Path) -> Path:
    """Where to load weights from, given any folder: those of a run are its last ones; while there are none, or the run
    went on since, those of its newest intact snapshot; and else the best, in BEST. Says, as a warning, when it is not
    `folder` itself. A snapshot is verified. Raises SnapshotError where a run or a snapshot has no weights to load."""
    if (folder / MANIFEST).is_file() and (folder / STATE).is_file():
        return verified(folder).path
    if not (folder / SETTINGS).is_file():
        return folder
    last = finished_step(folder)
    there = candidates(folder / SNAPSHOTS)
    if last is not None and (not there or there[0][0] <= last):
        return folder
    found, passed_over = newest(folder / SNAPSHOTS)
    if found is not None and (last is None or found.step > last):
        place, why = found.path, f"the newest snapshot, of step {found.step}"
    elif last is not None:
        return folder
    elif (folder / BEST / "model.safetensors").is_file():
        place, why = folder / BEST, "those of its best validation"
    else:
        reasons = "; ".join(passed_over) or "it was stopped before its first snapshot"
        raise SnapshotError(f"{folder} is a run that has no weights yet: {reasons}")
    warnings.warn(f"{folder} is a run that has not ended; its weights here are {place}, {why}", stacklevel=2)
    return place


def finished_step(folder: Path) -> float | None:
    """The step of the last weights of a run; infinity for those of an older version, which did not write it down; None
    where there are none."""
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return None
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return float(settings.get("finished", "inf"))
    except (OSError, ValueError, TypeError, AttributeError):
        return float("inf")


def newest(root: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest snapshot under `root` that verifies, if there is one, and why each newer one was passed over."""
    passed_over: list[str] = []
    for step, path in candidates(root):
        try:
            return verified(path, step), passed_over
        except SnapshotError as error:
            passed_over.append(str(error))
    return None, passed_over


def candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, path) of the folders that look like snapshots, newest first."""
    if not root.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def verified(path: Path, step: int | None = None) -> Snapshot:
    """The snapshot in a folder, which is one of `step` where that is given. Raises SnapshotError if it is damaged."""
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise SnapshotError(f"{path / MANIFEST}: format is {manifest.get('format')!r}, expected {FORMAT!r}")
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise SnapshotError(f"{path / MANIFEST}: lists no {STATE}")
    for name, expected in files.items():
        file = path / name
        if not isinstance(expected, dict) or not file.is_file():
            raise SnapshotError(f"{file}: missing")
        if file.stat().st_size != expected.get("bytes"):
            raise SnapshotError(f"{file}: {file.stat().st_size} bytes, expected {expected.get('bytes')}")
        try:
            digest = sha256_of(file)
        except OSError as error:
            raise SnapshotError(f"{file}: cannot be read: {error}") from None
        if digest != expected.get("sha256"):
            raise SnapshotError(f"{file}: its SHA-256 is not the one in {MANIFEST}: damaged")
    state = _read_json(path / STATE)
    if state.get("step") != (state.get("step") if step is None else step):
        raise SnapshotError(f"{path}: the folder says step {step}, its {STATE} says {state.get('step')}")
    return Snapshot(path, state["step"], state)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise SnapshotError(f"{path}: expected a JSON object")
    return value
