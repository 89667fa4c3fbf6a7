"""The devices: which there is, and how not to wait for it where that can be helped."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pick_device", "readable", "synchronize", "to_device"]


def pick_device(name: str) -> torch.device:
    """The device called `name`: cpu, cuda, cuda:N or mps; auto is CUDA, else MPS, else the CPU. Raises ValueError for
    one that is not here."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    there = [kind for kind, n in counts.items() if n]
    try:
        device = torch.device(there[0] if name == "auto" else name)
    except RuntimeError:  # no kind of device that torch has heard of
        device = torch.device("meta")
    if (device.index or 0) >= counts.get(device.type, 0):
        raise ValueError(f"--device {name} is not available; there is {', '.join(there)}")
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. A copy to CUDA is only begun, from pinned memory: it runs beside what the device and
    this process do meanwhile."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def readable(tensor: Tensor) -> bool:
    """Whether to look at the values, for a check, is free: not on an accelerator, for which one would wait, nor while a
    graph is traced, when there are none."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and tensor.device.type == "cpu"


def synchronize(device: torch.device) -> None:
    """Return when the device has done what it was given so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()
