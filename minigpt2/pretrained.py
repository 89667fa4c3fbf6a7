"""What is done with a whole model beside running it: methods of GPT2 that call functions of other files, which are
imported when they are called, since they are built on the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from minigpt2.model import GPT2
    from minigpt2.tokenizer import Tokenizer

__all__ = ["Pretrained"]


class Pretrained(nn.Module):
    """Loading, saving, resizing and generation, for GPT2 to inherit."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **settings: Any) -> GPT2:
        """Load `gpt2`, another model of the Hugging Face hub ("OWNER/NAME") or a folder with config.json and
        safetensors, in evaluation mode; `settings` are those of weights.from_pretrained: `revision`, the dials,
        `attention`, `dtype`, and fields of the configuration."""
        from minigpt2.weights import from_pretrained

        return from_pretrained(name_or_path, **settings)

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write model.safetensors, config.json, generation_config.json and the files of the tokenizer, if one is given:
        transformers loads them as they are; see weights.py."""
        from minigpt2.weights import save_pretrained

        save_pretrained(cast("GPT2", self), folder, tokenizer)

    def resize_vocabulary(self, n: int) -> None:
        """Give the model a vocabulary of n token ids, before its optimizer is made; see weights.py."""
        from minigpt2.weights import resize_vocabulary

        resize_vocabulary(cast("GPT2", self), n)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **settings: Any) -> Tensor:
        """Continue input_ids (B, T) by up to max_new_tokens: (B, T + new); `settings` are those of generate.py, such
        as temperature=0."""
        from minigpt2.generate import generate

        return generate(cast("GPT2", self), input_ids, max_new_tokens, **settings)
