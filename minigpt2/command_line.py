"""Command lines: what is wrong with one and what it warns of, in one line; and printing, wherever it goes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tyro

__all__ = [
    "ATTENTIONS",
    "RECOMPUTES",
    "complain",
    "deferred",
    "one_line_warnings",
    "optional",
    "parsed",
    "reader_left",
    "replace_unprintable",
]

T = TypeVar("T")


def optional(metavar: str) -> object:
    """For `Annotated`: an option that may be left out, whose help says itself what then holds."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


RECOMPUTES = tyro.conf.arg(metavar="{block,keep-attention,pointwise}")
ATTENTIONS = tyro.conf.arg(metavar="{auto,eager,sdpa,fused}")
"""For `Annotated`: strings of which the model itself refuses what it does not know."""


def parsed(parse: Callable[[], T]) -> T:
    """The result of `parse`, a call of tyro. Raises ValueError, in one line, where tyro would print a box and exit with
    status 2: for a command line that it cannot read."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            result = parse()
    except SystemExit as end:
        if end.code != 2:
            raise
        raise ValueError(_one_line(said.getvalue())) from None
    except BrokenPipeError:  # of the help
        raise SystemExit(reader_left()) from None
    sys.stderr.write(said.getvalue())
    return result


def deferred(function: Callable[..., T]) -> Callable[..., Callable[[], T]]:
    """The function for tyro to parse and not yet to run: with its signature and docstring, it returns the call."""
    # tyro keeps a line break before an indented line, as if it were an example.
    function.__doc__ = re.sub(r"\n {8,}(?=\S)", " ", inspect.cleandoc(function.__doc__ or ""))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Callable[[], T]:
        return functools.partial(function, *args, **kwargs)

    return call


def _one_line(box: str) -> str:
    """The sections of tyro's box, between rules, without the help on an argument that it repeats."""
    rows = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = " ".join("\0" if row and not row.strip("─") else row for row in rows).split("\0")
    texts = [" ".join(section.split()).rstrip(".") for section in sections]
    return "; ".join(text for text in texts if not text.startswith("Argument helptext"))


@contextlib.contextmanager
def one_line_warnings(program: str) -> Iterator[None]:
    """Print the warnings of the block as a user reads them: a line each, without the code that gave them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"{program}: {message}", file=sys.stderr)
        yield


def replace_unprintable() -> None:
    """Have standard output show ? for each character that its encoding lacks, where it would raise an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def reader_left() -> int:
    """Close standard output, whose reader, such as `head`, has what it wanted; return the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would fail to flush
    return 141


def complain(error: Exception, status: int) -> int:
    """Say on standard error what is wrong, in one line, under the name of the program; return the exit status."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    return status
