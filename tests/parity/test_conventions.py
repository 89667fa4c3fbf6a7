"""The table of weights/README.md "From Hugging Face's arguments to ours", a test for each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minigpt2 import GPT2

transformers = pytest.importorskip("transformers")

IDS = torch.randint(503, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


@pytest.fixture
def theirs(hf_tiny: Path) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(hf_tiny).eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_labels_are_shifted_by_the_caller(theirs: Any, tiny_model: GPT2) -> None:
    close(tiny_model.loss(IDS[:, :-1], IDS[:, 1:]), theirs(IDS, labels=IDS).loss)


def test_positions_of_a_padded_batch(theirs: Any, tiny_model: GPT2) -> None:
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    real = MASK.bool()
    derived, plain = theirs(IDS, attention_mask=MASK, position_ids=positions), theirs(IDS, attention_mask=MASK)
    close(tiny_model(IDS, MASK)[real], derived.logits[real])
    close(tiny_model(IDS, MASK, position_ids=torch.arange(12)[None])[real], plain.logits[real])
    assert not torch.allclose(derived.logits[0, 5:], plain.logits[0, 5:], atol=1e-2)


def test_a_label_predicted_from_padding_counts(theirs: Any, tiny_model: GPT2) -> None:
    labels = IDS.masked_fill(MASK == 0, -100)  # labels[0, 5], the first real one, is predicted from padding
    arguments = {"attention_mask": MASK[:, :-1], "position_ids": torch.arange(11)[None]}
    expected = theirs(IDS, attention_mask=MASK, labels=labels).loss
    targets = labels[:, 1:]
    assert not torch.allclose(tiny_model.loss(IDS[:, :-1], targets.masked_fill(MASK[:, :-1] == 0, -100)), expected)
    labels = labels.clone()
    labels[0, 5] = -100
    close(
        tiny_model.loss(IDS[:, :-1], labels[:, 1:], **arguments), theirs(IDS, attention_mask=MASK, labels=labels).loss
    )


@pytest.mark.parametrize("position_ids", [torch.full((2, 12), 64), torch.zeros(12), torch.zeros(2, 11).long()])
def test_positions_that_do_not_fit(tiny_model: GPT2, position_ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"position 64 is outside the context \[0, 64\)|position_ids must be integers"):
        tiny_model(IDS, position_ids=position_ids)


def test_max_length_counts_the_prompt(theirs: Any, tiny_model: GPT2) -> None:
    expected = theirs.generate(IDS, attention_mask=MASK * 0 + 1, max_length=20, do_sample=False, eos_token_id=None)
    assert torch.equal(tiny_model.generate(IDS, 20 - IDS.size(1), temperature=0), expected)


def test_do_sample_is_a_temperature(theirs: Any, tiny_model: GPT2) -> None:
    greedy = theirs.generate(IDS, attention_mask=MASK * 0 + 1, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(tiny_model.generate(IDS, 8, temperature=0), greedy)
    drawn = [tiny_model.generate(IDS, 8, temperature=5.0, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    assert not torch.equal(*drawn)


def test_end_of_text_is_said_by_the_caller(theirs: Any, tiny_model: GPT2) -> None:
    free = tiny_model.generate(IDS[:1], 20, temperature=0)
    end = int(free[0, 18])
    tiny_model.config = tiny_model.config.replace(eos_token_id=end)
    theirs.generation_config.eos_token_id = end
    stopped = theirs.generate(IDS[:1], attention_mask=MASK[:1] * 0 + 1, max_new_tokens=20, do_sample=False)
    assert torch.equal(tiny_model.generate(IDS[:1], 20, temperature=0), free)
    found = tiny_model.generate(IDS[:1], 20, temperature=0, eos_token_id=tiny_model.config.eos_token_ids)
    assert torch.equal(found, stopped)
