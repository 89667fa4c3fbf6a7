"""GPT-2's byte-pair encoding, from the ranks file in this package: no network, no cache folder."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

__all__ = ["END_OF_TEXT", "get_tokenizer", "token_bytes"]

END_OF_TEXT = 50256
"""The id of <|endoftext|>, which separates documents."""

RANKS_FILE = Path(__file__).with_name("gpt2.tiktoken")
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """The encoding of every GPT-2 size, as tiktoken has it: 50,256 byte-pair tokens and `<|endoftext|>`.

    `encode_ordinary(text)` takes any text: `<|endoftext|>` in it is seven tokens like any others, and lone surrogates,
    which UTF-8 cannot hold, become U+FFFD. `encode(text)` refuses a text with `<|endoftext|>` in it, unless
    `allowed_special` makes that one token or `disallowed_special=()` makes it text.

    Raises RuntimeError if the ranks file of the package was altered.
    """
    contents = RANKS_FILE.read_bytes()
    digest = hashlib.sha256(contents).hexdigest()
    if digest != RANKS_SHA256:
        raise RuntimeError(f"{RANKS_FILE}: sha256 is {digest}, expected {RANKS_SHA256}; reinstall minigpt2")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, contents.splitlines())}
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
        explicit_n_vocab=END_OF_TEXT + 1,
    )


def token_bytes(token: int) -> bytes:
    """The bytes that a token stands for. An id after the tokenizer's, as in a padded vocabulary, stands for a byte that
    is no character's."""
    tokenizer = get_tokenizer()
    return tokenizer.decode_single_token_bytes(token) if token < tokenizer.n_vocab else b"\xff"
