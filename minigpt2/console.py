"""Printing, wherever it goes."""

from __future__ import annotations

import io
import sys

__all__ = ["replace_unprintable"]


def replace_unprintable() -> None:
    """Have standard output show ? for each character that its encoding lacks, where it would raise an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
