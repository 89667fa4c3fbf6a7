"""What the fuzz scripts share: many cases, each of a seed of its own, and a list of what they found."""

from __future__ import annotations

import argparse
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable

__all__ = ["Finding", "main", "run"]

Case = Callable[[random.Random, "Counter[str]"], None]


class Finding(AssertionError):
    """What a case shows to be wrong."""


def run(case: Case, n: int, seed: int, *, first: int = 0) -> tuple[list[str], Counter[str]]:
    """Run cases `first` to `first + n - 1` of a seed. Each counts its kind of outcome; whatever it raises is a finding,
    under its number."""
    findings: list[str] = []
    counts: Counter[str] = Counter()
    for i in range(first, first + n):
        try:
            case(random.Random(f"{seed} {i}"), counts)
        except Finding as finding:
            findings.append(f"case {i}: {finding}")
        except Exception:
            findings.append(f"case {i}: {traceback.format_exc()}")
    return findings, counts


def main(case: Case, n: int = 10_000) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=n, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case, to repeat one of a run")
    arguments = parser.parse_args()
    findings, counts = run(case, arguments.n, arguments.seed, first=arguments.first)
    print("\n".join(findings))
    print(f"{arguments.n} cases of seed {arguments.seed}: {dict(counts)}, {len(findings)} findings")
    sys.exit(bool(findings))
