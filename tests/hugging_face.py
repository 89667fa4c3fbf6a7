"""Models of transformers to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt2.tokenizer import get_tokenizer


def random_hf(config: GPT2Config, seed: int = 0) -> GPT2LMHeadModel:
    """A Hugging Face model in which every parameter counts: no bias is 0, no LayerNorm the identity."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".ln_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.mul_(3.0)  # away from the flat logits of a fresh model
    return model.eval()


def first_tokens(folder: Path, n: int) -> None:
    """Write the vocab.json and merges.txt of a tokenizer of n tokens: the first n - 1 of GPT-2's, and <|endoftext|>."""
    files = get_tokenizer().files
    vocabulary = {text: i for text, i in json.loads(files["vocab.json"]).items() if i < n - 1} | {
        "<|endoftext|>": n - 1
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_bytes(b"".join(files["merges.txt"].splitlines(keepends=True)[: n - 256]))
