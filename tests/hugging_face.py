"""Models of transformers to compare with."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel


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
