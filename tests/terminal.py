"""A terminal of 80 columns to run a command on, and to type at it."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Sequence

import pytest

pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
fcntl, termios, struct = (pytest.importorskip(name) for name in ("fcntl", "termios", "struct"))


def on_a_terminal(
    command: list[str], env: dict[str, str], typed: Sequence[str] = (), seconds: float = 60
) -> tuple[int, str]:
    """Run a command with a terminal for its three streams; each time that it asks with "> ", type the next text. Return
    its exit status and all that the terminal showed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {key: value for key, value in env.items() if not key.startswith("TQDM_") and key != "COLUMNS"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=env | {"TERM": "xterm"}, start_new_session=True
    )
    os.close(theirs)
    shown, waiting, end = "", list(typed), time.monotonic() + seconds
    while time.monotonic() < end:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            block = os.read(ours, 4096)
        except OSError:  # Linux, where the other end is closed
            break
        if not block:
            break
        shown += block.decode(errors="replace")
        if waiting and shown.endswith("\n> "):
            os.write(ours, waiting.pop(0).encode())
    os.close(ours)
    if process.poll() is None and time.monotonic() >= end:
        process.kill()
    return process.wait(timeout=10), shown
