"""The device that computes: choosing it, copying to it, waiting for it, and the memory that is held."""

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from minigpt2.torch_private import untouched

__all__ = ["is_out_of_memory", "peak_bytes", "pick_device", "readable", "resident_bytes", "synchronize", "to_device"]


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there was no memory for a tensor."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device. A copy to CUDA goes through pinned memory and is not waited for: the device and
    this process work on meanwhile."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def readable(tensor: Tensor) -> bool:
    """Whether a check may look at the tensor's values. On an accelerator that would mean waiting for it, and while
    operations are traced or transformed there are none."""
    return tensor.device.type == "cpu" and untouched(tensor)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def resident_bytes() -> int:
    """Resident memory of this process now; on macOS, which tells only that, its peak so far."""
    return _resident("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: resident, or on a CUDA device that of its tensors there."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes, from whatever the system has to read it."""
    with suppress(OSError):  # Linux, where getrusage would give a child the peak of its parent
        status = Path("/proc/self/status").read_text()
        if found := re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE):
            return int(found[1]) * 1024
    if sys.platform == "win32":
        counters = (ctypes.c_size_t * 9)(72)  # PROCESS_MEMORY_COUNTERS: its size, peak working set, working set, ...
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)
        return counters[1 if field == "VmHWM" else 2]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
