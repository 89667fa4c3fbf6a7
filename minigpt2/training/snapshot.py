"""Snapshots: training state on disk that survives a crash at any instant. Knows nothing of the model.

A snapshot is a folder, `step-00000120`, with groups of tensors in safetensors (`weights.safetensors`,
`optimizer.safetensors`, ...), everything else in `state.json`, and the size and SHA-256 of each file in
`manifest.json`. It is written under a hidden name, flushed to disk and renamed, so a folder of that name is complete or
not there; the digests catch what happens to it afterwards. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from minigpt2.files import flush, sha256_of

__all__ = [
    "Snapshot",
    "SnapshotError",
    "full_tensor",
    "load_optimizer",
    "load_weights",
    "newest",
    "optimizer_tensors",
    "random_state",
    "save",
    "set_random_state",
    "weight_tensors",
]

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


def save(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 0
) -> Path:
    """Write `root`/step-NNNNNNNN and return it; then delete all but the newest `keep` up to this step (0: none).

    tensors: for each group, its named tensors, of any dtype and device. state: JSON values. Raises SnapshotError when
    the disk refuses; what was there before is untouched, and no half of a snapshot is left.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _delete_hidden(root)
        temporary.mkdir()
        for group, named in tensors.items():
            save_file({name: t.detach().contiguous() for name, t in named.items()}, temporary / f"{group}.safetensors")
        _write_json(temporary / STATE, {"step": step, **state})
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())
        }
        _write_json(temporary / MANIFEST, {"format": FORMAT, "files": files})
        for path in [*temporary.iterdir(), temporary]:
            if path.suffix == ".safetensors":
                with suppress(OSError):  # some file systems know no permissions
                    path.chmod((temporary / STATE).stat().st_mode)  # safetensors makes private files
            flush(path)
        if final.exists():  # damaged, or the same; a folder is renamed only onto nothing
            _hide(final)
        temporary.rename(final)
        flush(root)
        for path in [p for n, p in _candidates(root) if n <= step][keep:] if keep else []:
            _hide(path)
        _delete_hidden(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        found = newest(root)[0]
        intact = f"the newest intact snapshot is {found.path}" if found else "there is no intact snapshot"
        raise SnapshotError(f"cannot write {final}: {error}; {intact}") from error
    return final


def _hide(path: Path) -> None:
    """Rename a snapshot that is to be deleted, so that a deletion that is cut short leaves nothing that looks like one.
    Where a folder cannot be renamed, as one of a container's image, it is deleted as it is."""
    try:
        path.rename(path.with_name(f".{path.name}.old.tmp"))
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def _delete_hidden(root: Path) -> None:
    """Delete the snapshots that `_hide` left, and those that a process was writing when it was killed: only one process
    writes to a folder."""
    for path in root.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def newest(root: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest snapshot under `root` that verifies, if there is one, and why each newer one was passed over."""
    passed_over: list[str] = []
    for step, path in _candidates(root):
        try:
            return _verified(path, step), passed_over
        except SnapshotError as error:
            passed_over.append(str(error))
    return None, passed_over


def _candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, path) of the folders that look like snapshots, newest first."""
    if not root.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _verified(path: Path, step: int) -> Snapshot:
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
    if state.get("step") != step:
        raise SnapshotError(f"{path}: the folder says step {step}, its {STATE} says {state.get('step')}")
    return Snapshot(path, step, state)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise SnapshotError(f"{path}: expected a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def random_state(device: torch.device) -> dict[str, str]:
    """The states of PyTorch's random number generators, of the CPU and of `device`, as JSON values. A run draws from no
    others."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return {name: state.numpy().tobytes().hex() for name, state in states.items()}


def set_random_state(states: Mapping[str, Any], device: torch.device) -> None:
    """Undo what was drawn since `random_state`. A generator that has no state in `states` keeps its own; states of
    others, which older snapshots have, are ignored."""

    def state(name: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(states[name]), dtype=torch.uint8)

    torch.set_rng_state(state("torch"))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(state("cuda"), device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(state("mps"))


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is sharded over processes, each of which must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weight_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Every parameter under its name, gathered by all processes, one at a time, if it is sharded. Only processes that
    `keep` them get them, on the CPU; a tensor that is there already is not copied."""
    return _gathered(dict(model.named_parameters()), keep)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """The optimizer's tensors for each parameter, as `NAME/exp_avg` and so on; see weight_tensors."""
    of_parameters = {name: optimizer.state[p] for name, p in model.named_parameters()}
    return _gathered({f"{name}/{key}": t for name, state in of_parameters.items() for key, t in state.items()}, keep)


# Not by torch.distributed.checkpoint.state_dict: for an optimizer without state, as in the snapshot before the first
# step, it takes a step, which counts in Adam's bias correction ever after; and it loads beside gradients and a state.
def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if keep:
            kept[name] = full.cpu()
    return kept


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors that are not sharded into parameters that may be. Raises SnapshotError where they do not fit."""
    parameters = dict(model.named_parameters())
    _check_fit({name: (p.shape, p.dtype) for name, p in parameters.items()}, tensors)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(_placed_like(p, tensors[name]))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that `optimizer_tensors` took; a parameter without any starts anew."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in parameters:
            raise SnapshotError(f"the optimizer state {key} belongs to no parameter of this model")
        p = parameters[name]
        # A scalar, such as AdamW's count of steps, is not sharded.
        state = value.to(p.device) if value.dim() == 0 else _placed_like(p, value)
        optimizer.state[p][kind] = state


def _placed_like(p: Tensor, value: Tensor) -> Tensor:
    """`value` on p's device and sharded as p is."""
    value = value.to(p.device)
    return distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value


def _check_fit(expected: Mapping[str, tuple[torch.Size, torch.dtype]], tensors: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    for name, (shape, dtype) in expected.items():
        if name in tensors and (tensors[name].shape, tensors[name].dtype) != (shape, dtype):
            there = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
            problems.append(f"{name} is {there}, the model has {tuple(shape)} {dtype}")
    if problems:
        raise SnapshotError("; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if problems[12:] else ""))
