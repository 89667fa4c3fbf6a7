"""The head of every benchmark's output: without it a figure says nothing."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

__all__ = ["header"]


def header(name: str) -> str:
    """Machine, versions, threads and command, in a few lines."""
    import torch

    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    processor = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return (
        f"bench {name}: {processor}, {threads}, torch {torch.__version__}, Python {platform.python_version()}\n"
        f"command: {' '.join(['minigpt2', *sys.argv[1:]])}"
    )
