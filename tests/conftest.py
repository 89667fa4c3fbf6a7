"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach the network

OFFICIAL_GPT2 = Path(__file__).parent.parent / "weights" / "gpt2"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run or what must be asked for by `-m`."""
    asked = config.option.markexpr
    reasons = {
        "official": None if OFFICIAL_GPT2.is_dir() else "needs the official weights: minigpt2 download gpt2",
        "cuda": None if torch.cuda.is_available() else "needs a CUDA device",
        "large": None if "large" in asked else "takes minutes and 20 GiB of memory: run with pytest -m large",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
