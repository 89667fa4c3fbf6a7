"""GPT-2's byte-pair encoding, from the ranks file in this package: no network, no cache folder."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Collection, Set
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken_ext.openai_public import r50k_pat_str

__all__ = ["END_OF_TEXT", "GPT2Tokenizer", "get_tokenizer"]

END_OF_TEXT = 50256
"""The id of <|endoftext|>, which separates documents."""

RANKS_FILE = Path(__file__).with_name("gpt2.tiktoken")
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


class GPT2Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, except that `<|endoftext|>` inside a text is ordinary text unless `allowed_special` names
    it (tiktoken would raise)."""

    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Set[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Token ids of `text`. Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
        return super().encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)

    def encode_batch(
        self,
        text: list[str],
        *,
        num_threads: int = 8,
        allowed_special: Literal["all"] | Set[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them, with threads."""
        return super().encode_batch(
            text,
            num_threads=num_threads,
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
        )

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Set[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> NDArray[np.uint32]:
        """Token ids of `text`, as `encode` gives them, in an array."""
        return super().encode_to_numpy(
            _without_surrogates(text), allowed_special=allowed_special, disallowed_special=disallowed_special
        )

    def encode_with_unstable(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Set[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> tuple[list[int], list[list[int]]]:
        """The ids that more text cannot change, and the possible continuations of the rest; see tiktoken."""
        return super().encode_with_unstable(
            _without_surrogates(text), allowed_special=allowed_special, disallowed_special=disallowed_special
        )


def _without_surrogates(text: str) -> str:
    """Pairs joined and lone ones replaced by U+FFFD: what tiktoken's encode does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.cache
def get_tokenizer() -> GPT2Tokenizer:
    """The encoding of every GPT-2 size: 50,256 byte-pair tokens and `<|endoftext|>`.

    Raises RuntimeError if the ranks file of the package was altered.
    """
    contents = RANKS_FILE.read_bytes()
    digest = hashlib.sha256(contents).hexdigest()
    if digest != RANKS_SHA256:
        raise RuntimeError(f"{RANKS_FILE}: sha256 is {digest}, expected {RANKS_SHA256}; reinstall minigpt2")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, contents.splitlines())}
    return GPT2Tokenizer(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
        explicit_n_vocab=END_OF_TEXT + 1,
    )
