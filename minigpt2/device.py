"""The devices: which there is, and how to wait for it."""

from __future__ import annotations

import torch

__all__ = ["pick_device", "synchronize"]


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


def synchronize(device: torch.device) -> None:
    """Return when the device has done what it was given so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()
