"""What a comparison finds: rows of a table, and the parts that differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FLOAT64_BOUND", "TIMES", "Fault", "Parity", "Row", "compare_tensors"]

TIMES = 4
"""How many times transformers' own rounding error the two may be apart."""
FLOAT64_BOUND = 1e-12


class Row(NamedTuple):
    """One comparison of minigpt2 with transformers."""

    part: str
    largest: float
    """The largest absolute difference."""
    relative: float
    """The norm of the difference over the norm in float64, at the worst position."""
    bound: float
    """What `relative` may be."""

    @property
    def share(self) -> float:
        """Of the bound; more than 1 is too much."""
        return self.relative / self.bound if math.isfinite(self.relative) else math.inf

    def __str__(self) -> str:
        over = " !" if self.share > 1 else "  "
        return f"{self.part:24} {self.largest:9.2e} {self.relative:9.2e} {self.bound:9.2e}{over}"


def compare_tensors(part: str, ours: Tensor, theirs: Tensor, exact: Tensor, *, whole: bool = False) -> Row:
    """Compare position by position, the last dimension being one's vector, or as a `whole`."""
    dtype, columns = theirs.dtype, exact.numel() if whole else exact.size(-1)
    mine, others, reference = (t.detach().double().reshape(-1, columns) for t in (ours, theirs, exact))
    size = reference.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    difference = mine - others
    rounding = ((others - reference).norm(dim=1) / size).max().item()
    if not math.isfinite(rounding):
        raise ValueError(f"{part}: transformers itself overflows {dtype}; there are other values of --dtype")
    bound = FLOAT64_BOUND if dtype == torch.float64 else TIMES * rounding + torch.finfo(dtype).eps
    return Row(part, difference.abs().max().item(), (difference.norm(dim=1) / size).max().item(), bound)


class Fault(NamedTuple):
    """A part that differs, and in what."""

    part: str
    reason: str


class Parity:
    """What was compared: `numbers` by section, and `faults`, the first of which is at the first module that differs.
    `say` is called with each line of the table as soon as it is known."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.numbers = say, dict[str, Any]()
        self.faults: list[Fault] = []

    def expect(self, holds: bool, part: str, reason: str) -> None:
        """Note a fault unless `holds`."""
        if not holds:
            self.faults.append(Fault(part, reason))

    def expect_close(self, row: Row, part: str, reason: str) -> None:
        """Note a fault unless the row is within its bound."""
        self.expect(row.share <= 1, part, f"{reason} (by {row.relative:.2g}; the bound is {row.bound:.2g})")

    @property
    def verdict(self) -> str:
        """PASS, or the first module that differs, and in what."""
        return "FAIL: {} is the first that differs: {}".format(*self.faults[0]) if self.faults else "PASS"

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON takes it; a number that is not finite is null."""
        first = self.faults[0]._asdict() if self.faults else None
        return _plain({**self.numbers, "passes": not self.faults, "first": first, "verdict": self.verdict})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
