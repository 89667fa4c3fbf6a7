"""Progress: a bar on a terminal, and elsewhere, such as in a log file, a line every so often."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "of_downloads"]

EVERY = 20.0
"""Seconds from one line to the next."""

LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}{postfix}, {elapsed} gone, {remaining} left"


class Progress(tqdm):  # type: ignore[type-arg]
    """tqdm's bar, drawn on standard error if that is a terminal. Otherwise it is one `line` (in the words of tqdm's
    `bar_format`) after the first step, every EVERY seconds and at the end. tqdm's environment variables hold:
    TQDM_DISABLE=1 shows neither, and TQDM_MININTERVAL=300 makes lines rarer.
    """

    _lines: _Lines | None = None

    def __init__(self, *args: Any, line: str = LINE, disable: bool = False, **options: Any) -> None:
        if disable:  # an argument overrides TQDM_DISABLE, so False is not passed on
            options["disable"] = True
        options.pop("name", None)  # of some versions of huggingface_hub, which tqdm does not know
        if sys.stderr is None or not sys.stderr.isatty():
            self._lines = _Lines()
            options |= {"file": self._lines, "bar_format": line, "miniters": 1}
        super().__init__(*args, **options)
        if self._lines is not None:
            self._lines.ready = True

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more."""
        if self._lines is not None and self.total and self.n + (n or 0) >= self.total and not self.disable:
            self.n += n or 0  # the line at the end says it
            return None
        shown = super().update(n)
        if shown and self._lines is not None:
            self.mininterval = max(self.mininterval, EVERY)
        return shown

    def finish(self) -> None:
        """All is done: what was counted is the whole, whatever the total was expected to be."""
        self.total = self.n


def of_downloads(download: Callable[..., Any]) -> dict[str, Any]:
    """The argument with which huggingface_hub's `download` shows its progress as ours, where its version has one and
    bars are not turned off (HF_HUB_DISABLE_PROGRESS_BARS=1)."""
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

    known = "tqdm_class" in inspect.signature(download).parameters
    return {"tqdm_class": Progress} if known and not are_progress_bars_disabled() else {}


class _Lines:
    """A file for tqdm that prints each state of its bar as a line, except the one before the first step."""

    def __init__(self) -> None:
        self.ready, self._last = False, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if self.ready and line not in ("", self._last) and sys.stderr is not None:
            self._last = line
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass
