"""Published facts about the official 124M weights, for whoever has them: `minigpt2 download gpt2`, then pytest."""

from __future__ import annotations

import pytest
import torch

from minigpt2 import GPT2
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer
from minigpt2.weights import OFFICIAL, WEIGHTS_FILE, find_folder, verify

pytestmark = pytest.mark.official


@pytest.fixture(scope="module")
def gpt2() -> GPT2:
    verify(find_folder("gpt2") / WEIGHTS_FILE, OFFICIAL["gpt2"])
    return GPT2.from_pretrained("gpt2")


def test_greedy_continuation(gpt2: GPT2) -> None:
    """From transformers' tests/models/gpt2/test_modeling_gpt2.py: "The dog was found in a field ..."."""
    output = gpt2.generate(torch.tensor([[464, 3290]]), 18, temperature=0)
    expected = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198]
    assert output[0].tolist() == [*expected, 464, 3290]


def test_left_padded_batch(gpt2: GPT2) -> None:
    """From the same file: batch generation with padding on the left."""
    tokenizer = get_tokenizer()
    prompts = [tokenizer.encode(text) for text in ("Hello, my dog is a little", "Today, I")]
    longest = max(map(len, prompts))
    rows = [[END_OF_TEXT] * (longest - len(p)) + p for p in prompts]
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    # transformers generates to a total length of 20 unless told otherwise.
    output = gpt2.generate(torch.tensor(rows), 20 - longest, temperature=0, attention_mask=mask)
    texts = [tokenizer.decode(row[longest - len(p) :]) for row, p in zip(output.tolist(), prompts, strict=True)]
    assert texts == [
        "Hello, my dog is a little bit of a mess. I'm not sure if he's going",
        "Today, I'm going to be doing a lot of research on this. I",
    ]
