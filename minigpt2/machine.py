"""How much memory this machine has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["free_bytes"]

# Of a control group, by version (docs.kernel.org: admin-guide/cgroup-v2 and cgroup-v1/memory): where its hierarchy
# lies, the files of its limits and of what it uses, and what of that the kernel would give up, being copies of files.
GROUPS = {
    2: ("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: ("sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process could still take without swapping: what the system has, and within the limits of the
    control groups that the process is in. ValueError where the system does not say, as macOS and Windows do not.
    `root` is where /proc and /sys lie."""
    found = [*_of_system(root), *_of_groups(root)]
    if not found:
        raise ValueError("this system does not say how much memory is free; give an amount, such as 4GiB")
    return max(0, min(found))


def _of_system(root: Path) -> Iterator[int]:
    available = _field(root / "proc" / "meminfo", "MemAvailable:")
    if available is not None:
        yield available * 1024
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> Iterator[int]:
    for version, group in _groups(root):
        folder, limits, usage, file_pages = GROUPS[version]
        # A container may see the path of the system outside, and only its own group, as the root of all.
        for path in [group, *group.parents]:
            place = root / folder / path.relative_to("/")
            used = _number(place / usage)
            for limit in [_number(place / name) for name in limits]:
                if used is not None and limit is not None:
                    yield limit - used + (_field(place / "memory.stat", file_pages) or 0)


def _groups(root: Path) -> Iterator[tuple[int, PurePosixPath]]:
    """The groups of this process that limit memory, by the version of their hierarchy."""
    text = _text(root / "proc" / "self" / "cgroup")
    for line in (text or "0::/\n0:memory:/").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            yield 1 if controllers else 2, PurePosixPath(path)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else None  # or it is "max", which is none


def _field(path: Path, name: str) -> int | None:
    for line in (_text(path) or "").splitlines():
        if line.split()[:1] == [name]:
            return int(line.split()[1])
    return None
