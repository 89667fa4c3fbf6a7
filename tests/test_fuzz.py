"""The fuzz scripts run, find nothing in a few cases, and would find something."""

from __future__ import annotations

import random
from collections import Counter

import fuzz_cli
import fuzz_tokenizer
import fuzz_weights
import fuzzing
import pytest
import torch

from minigpt2 import GPT2


@pytest.mark.parametrize(("script", "n"), [(fuzz_weights, 100), (fuzz_tokenizer, 100), (fuzz_cli, 20)])
def test_a_few_cases(script, n):
    findings, counts = fuzzing.run(script.case, n, 0)
    assert findings == []
    assert sum(counts.values()) == n
    assert len(counts) >= 2  # outcomes


def test_a_wrong_load_would_be_found(monkeypatch):
    load = GPT2.from_pretrained

    def spoiled(folder):
        model = load(folder)
        torch.nn.init.zeros_(model.ln_f.weight)
        return model

    monkeypatch.setattr(GPT2, "from_pretrained", spoiled)
    findings, counts = fuzzing.run(fuzz_weights.case, 40, 0)
    assert "ln_f.weight is not what the file says" in findings[0]
    assert not counts["loaded"]


def test_a_traceback_would_be_found():
    def case(rng: random.Random, counts: Counter[str]) -> None:
        raise KeyError(rng.random())

    findings, _ = fuzzing.run(case, 2, 0, first=7)
    assert [finding[:7] for finding in findings] == ["case 7:", "case 8:"]
    assert "KeyError" in findings[0]
