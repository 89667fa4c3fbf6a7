"""Which tokenizer a run has, and what that says of a fresh model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minigpt2.data.batches import is_token_folder
from minigpt2.tokenizer import Tokenizer, TokenizerError
from minigpt2.tokenizer_files import find_tokenizer, read_tokenizer
from minigpt2.weights import find_folder

__all__ = ["tokenizer_of_run", "vocabulary_of"]


def vocabulary_of(data: Path | None) -> dict[str, Any]:
    """The fields of GPT2Config for a fresh model that trains on `data`: those of OpenAI's tokenizer, which are the
    defaults, unless the folder of token files has another's."""
    found = read_tokenizer(data) if data is not None and is_token_folder(data) else None
    if found is None:
        return {}
    return {"vocab_size": found.n_vocab, "bos_token_id": found.end_of_text, "eos_token_id": found.end_of_text}


def tokenizer_of_run(
    init: str | None, data: Path | None, vocab_size: int, resumed: Path | None = None
) -> Tokenizer | None:
    """The tokenizer of the weights that a run starts from, or that of its token files; that of the run folder itself,
    if it is resumed. OpenAI's where there are no files of one and the vocabulary fits. None if that is unknown: the run
    takes token files only. Raises TokenizerError where text needs one."""
    folder = resumed or (find_folder(init) if init is not None else data if is_token_folder(data) else None)
    found = find_tokenizer(folder, vocab_size)
    if found is None and not is_token_folder(data):
        raise TokenizerError(
            f"{folder} has no tokenizer, and a vocabulary of {vocab_size} is not OpenAI's: it takes token files only"
        )
    return found
