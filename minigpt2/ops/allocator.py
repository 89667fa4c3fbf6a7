"""Where CPU tensors get their memory: kept and packed, rather than freed and faulted in again."""

from __future__ import annotations

import functools

from minigpt2.ops import build

__all__ = ["tune_allocator"]


@functools.cache
def tune_allocator() -> str:
    """Make PyTorch keep the memory of large CPU tensors in this process; return one line that says what was done.

    Affects tensors of at least 256 KiB made from now on, by any library that uses PyTorch's CPU allocator;
    allocator.cpp says how. The process keeps its largest size, and it cannot be undone. Needs a C++ compiler, on Linux
    or macOS; elsewhere it does nothing, and says so.
    """
    library = build.library("allocator", ("allocator.cpp",))
    if isinstance(library, str):
        return f"memory of CPU tensors: the C library's ({library})"
    refusals = {
        1: "the system refused to reserve addresses",
        2: "the compiler has another C++ library than PyTorch; use g++",
    }
    status = library.minigpt2_use_arena()
    if status:
        return f"memory of CPU tensors: the C library's ({refusals[status]})"
    return "memory of CPU tensors: kept and packed (minigpt2/ops/csrc/allocator.cpp)"
