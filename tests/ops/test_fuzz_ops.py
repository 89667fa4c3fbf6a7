"""A few of the random calls of fuzz_ops.py."""

import pytest
from fuzz_ops import case
from fuzzing import run

pytestmark = pytest.mark.usefixtures("needs_the_kernel")


def test_random_calls() -> None:
    findings, counts = run(case, 60, 0)
    assert not findings
    assert len(counts) > 6
