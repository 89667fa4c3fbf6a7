from collections.abc import Callable, Iterator

import pytest
import torch

from minigpt2.ops import kernel


@pytest.fixture
def needs_the_kernel() -> None:
    """Skips a test where there is no compiler; where there is one, a kernel that does not build is a failure."""
    reason = kernel.unavailable()
    if reason is not None and ("no C++ compiler" in reason or "it needs torch" in reason):
        pytest.skip(reason)
    assert reason is None


@pytest.fixture
def needs_tiles(needs_the_kernel: None) -> None:
    if not kernel.tiles():
        pytest.skip("this processor has no AMX, or the kernel was not compiled for it")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
