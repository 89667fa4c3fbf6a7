"""Snapshots: training state on disk that survives a crash at any instant. Knows nothing of the model.

A snapshot is a folder, `step-00000120`, with groups of tensors in safetensors (`weights.safetensors`,
`optimizer.safetensors`, ...), the model's config.json, the files of a tokenizer that is not OpenAI's, everything else
in `state.json`, and the size and SHA-256 of each file in `manifest.json`; minigpt2/run_folder.py reads it. It is
written under a hidden name, flushed to disk and renamed, so a folder of that name is complete or not there; the digests
catch what happens to it afterwards. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from minigpt2.files import flush, sha256_of
from minigpt2.run_folder import FORMAT, MANIFEST, STATE, Snapshot, SnapshotError, candidates, newest
from minigpt2.tokenizer import Tokenizer
from minigpt2.training.shards import full_tensor, placed_like

__all__ = [
    "Snapshot",
    "SnapshotError",
    "load_optimizer",
    "load_weights",
    "newest",
    "optimizer_tensors",
    "random_state",
    "save",
    "set_random_state",
    "weight_tensors",
]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 0,
    config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write `root`/step-NNNNNNNN and return it; then delete all but the newest `keep` up to this step (0: none).

    tensors: for each group, its named tensors, of any dtype and device. state: JSON values. config: what config.json
    is to say, which makes the folder one that weights can be loaded from. tokenizer: one whose files they need beside
    them. Raises SnapshotError when the disk refuses; what was there before is untouched, and no half of a snapshot is
    left.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _delete_hidden(root)
        temporary.mkdir()
        for group, named in tensors.items():
            # Straight from the tensors: a second copy of the state of a large model would not fit.
            save_file({name: t.detach().contiguous() for name, t in named.items()}, temporary / f"{group}.safetensors")
        _write_json(temporary / STATE, {"step": step, **state})
        if config is not None:
            _write_json(temporary / "config.json", config)
        if tokenizer is not None:
            tokenizer.save(temporary)
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
        for path in [p for n, p in candidates(root) if n <= step][keep:] if keep else []:
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


def weight_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Every parameter under its name, gathered by all processes, one at a time, if it is sharded. Only processes that
    `keep` them get them, on the CPU; a tensor that is there already is not copied."""
    return _gathered(dict(model.named_parameters()), keep)


def optimizer_tensors(model: nn.Module, optimizer: Any, *, keep: bool = True) -> dict[str, Tensor]:
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
            p.copy_(placed_like(p, tensors[name]))


def load_optimizer(model: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that `optimizer_tensors` took; a parameter without any starts anew."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in parameters:
            raise SnapshotError(f"the optimizer state {key} belongs to no parameter of this model")
        p = parameters[name]
        # A scalar, such as AdamW's count of steps, is not sharded.
        state = value.to(p.device) if value.dim() == 0 else placed_like(p, value)
        optimizer.state[p][kind] = state


def _check_fit(expected: Mapping[str, tuple[torch.Size, torch.dtype]], tensors: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    for name, (shape, dtype) in expected.items():
        if name in tensors and (tensors[name].shape, tensors[name].dtype) != (shape, dtype):
            there = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
            problems.append(f"{name} is {there}, the model has {tuple(shape)} {dtype}")
    if problems:
        raise SnapshotError("; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if problems[12:] else ""))
