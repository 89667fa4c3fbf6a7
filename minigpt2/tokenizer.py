"""Byte-level byte-pair encodings with GPT-2's pattern: OpenAI's own, whose merges are in this package, and those that
other checkpoints bring with them. No network, no cache folder."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken_ext.openai_public import r50k_pat_str

from minigpt2.files import atomic_write

__all__ = ["END_OF_TEXT", "Tokenizer", "TokenizerError", "get_tokenizer"]

END_OF_TEXT = 50256
"""The id of OpenAI's <|endoftext|>, which separates documents."""

# OpenAI's vocab.bpe, with the digest that tiktoken publishes for it.
MERGES_FILE = Path(__file__).with_name("gpt2.bpe")
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

VOCAB, MERGES, SETTINGS = "vocab.json", "merges.txt", "tokenizer_config.json"

# GPT-2's files write bytes as letters: those that can be printed as themselves, the others, in order, from U+0100 on.
_PRINTED = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
BYTES = [*_PRINTED, *(b for b in range(256) if b not in _PRINTED)]  # in the order of OpenAI's ids
LETTERS = {b: chr(b) if b in _PRINTED else chr(256 + i - len(_PRINTED)) for i, b in enumerate(BYTES)}
_FROM_LETTERS = {ord(letter): b for b, letter in LETTERS.items()}


class TokenizerError(ValueError):
    """A tokenizer that is absent, damaged, of another kind than GPT-2's, or not the one that made the tokens."""


class Special(NamedTuple):
    """A token that stands for its text as a whole, wherever that is met."""

    id: int
    lstrip: bool = False
    """The white space before it belongs to it; `rstrip`: after it."""
    rstrip: bool = False
    single_word: bool = False
    """It is not one inside a word."""


class Tokenizer:
    """A byte-level byte-pair encoding. `tiktoken` applies the merges.

    merges: the tokens that are made of two others, in order. ids: the token ids of the 256 bytes and of the merges'
    results. others: the bytes of the ids that no text is encoded to. special: the tokens that are met in text as a
    whole. end_of_text: the id that separates documents, if there is one. files: what `save` writes.
    """

    def __init__(
        self,
        merges: Iterable[bytes],
        ids: dict[bytes, int],
        others: dict[int, bytes],
        special: dict[str, Special],
        end_of_text: int | None,
        files: dict[str, bytes],
    ) -> None:
        tokens = [*(bytes([b]) for b in BYTES), *merges]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        # tiktoken wants a special token; it is never asked to find it in text.
        specials = {"<|endoftext|>": len(ranks)}
        self.encoding = tiktoken.Encoding(
            "minigpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials
        )
        self.special, self.end_of_text, self.files = special, end_of_text, files
        self.limit: int | None = None
        """The size of the model's vocabulary, where special tokens may lie beyond it."""
        self._ids = np.array([ids[token] for token in tokens], dtype=np.uint32)  # rank -> id
        self._bytes = {**others, **dict(zip(self._ids.tolist(), tokens, strict=True))}
        self._bytes |= {token.id: text.encode() for text, token in special.items()}
        self.n_vocab = max(self._bytes) + 1
        """One more than the highest token id."""
        self.ordinary = int(self._ids.max()) + 1
        """One more than the highest id of a token that is not special."""

    def __str__(self) -> str:
        official = self.fingerprint == get_tokenizer().fingerprint
        return "OpenAI's tokenizer" if official else f"the tokenizer {self.fingerprint}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of all that decides which ids a text has, and which text an id."""
        special = {text: tuple(token) for text, token in sorted(self.special.items())}
        table = {i: token.hex() for i, token in sorted(self._bytes.items())}
        contents = json.dumps([self._ids.tolist(), table, special, self.end_of_text])
        return hashlib.sha256(contents.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which each special token is one token. Lone surrogates, which UTF-8 cannot hold, become
        U+FFFD. Raises TokenizerError for a special token that the model's vocabulary lacks."""
        return self._encode(text, self._pattern(self.special)).tolist()

    def encode_document(self, text: str) -> NDArray[np.uint32]:
        """The same, (n,), but the text of the end-of-text token is text like any other: no document ends within."""
        return self._encode(text, self._pattern(self._inside))

    def encode_ordinary(self, text: str) -> list[int]:
        """The same, but that the texts of all special tokens are text like any other."""
        return self._encode(text, None).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are no character's become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for. An id that the tokenizer lacks, as in a padded vocabulary, stands for a
        byte that is no character's."""
        return self._bytes.get(int(token), b"\xff")

    @property
    def separator(self) -> int:
        """The id that separates documents. Raises TokenizerError if the tokenizer has none."""
        if self.end_of_text is None:
            raise TokenizerError(
                "the tokenizer has no end-of-text token: name it as eos_token in tokenizer_config.json"
            )
        return self.end_of_text

    def save(self, folder: Path, context: int | None = None) -> None:
        """Write the tokenizer's files into a folder, as transformers reads them, for a model of that context length."""
        files = self.files
        if SETTINGS not in files:
            names = [text for text, token in self.special.items() if token.id == self.end_of_text]
            settings: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"}
            settings |= {"model_max_length": context} if context else {}
            settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), names[0]) if names else {}
            settings |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
            files = files | {SETTINGS: json.dumps(settings, indent=2).encode() + b"\n"}
        folder.mkdir(parents=True, exist_ok=True)
        for name, contents in files.items():
            with atomic_write(folder / name) as path:
                path.write_bytes(contents)

    @property
    def _inside(self) -> dict[str, Special]:
        return {text: token for text, token in self.special.items() if token.id != self.end_of_text}

    @staticmethod
    def _pattern(special: dict[str, Special]) -> re.Pattern[str] | None:
        """Finds special tokens, of two that begin at one place the longer."""
        if not special:
            return None
        longest_first = sorted(special, key=len, reverse=True)
        wholes = [rf"(?<!\w){re.escape(t)}(?!\w)" if special[t].single_word else re.escape(t) for t in longest_first]
        return re.compile("|".join(wholes))

    def _encode(self, text: str, pattern: re.Pattern[str] | None) -> NDArray[np.uint32]:
        found: list[Any] = []
        start, strip = 0, False
        for match in pattern.finditer(text) if pattern else ():
            token = self.special[match[0]]
            if self.limit is not None and token.id >= self.limit:
                raise TokenizerError(
                    f"{match[0]!r} is token {token.id}, the model's vocabulary has {self.limit}; "
                    f"model.resize_vocabulary({token.id + 1}) makes room for it"
                )
            between = text[start : match.start()]
            between = between.lstrip() if strip else between
            found += [self._ordinary(between.rstrip() if token.lstrip else between), [token.id]]
            start, strip = match.end(), token.rstrip
        rest = text[start:]
        found.append(self._ordinary(rest.lstrip() if strip else rest))
        return np.concatenate(found).astype(np.uint32)

    def _ordinary(self, text: str) -> NDArray[np.uint32]:
        try:
            return self._ids[self.encoding.encode_to_numpy(text, disallowed_special=())]
        except UnicodeEncodeError:
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._ids[self.encoding.encode_to_numpy(whole, disallowed_special=())]


@functools.cache
def get_tokenizer() -> Tokenizer:
    """The encoding of every GPT-2 that OpenAI published: 50,256 byte-pair tokens and `<|endoftext|>`.

    Raises RuntimeError if the file of merges in this package was altered.
    """
    contents = MERGES_FILE.read_bytes()
    digest = hashlib.sha256(contents).hexdigest()
    if digest != MERGES_SHA256:
        raise RuntimeError(f"{MERGES_FILE}: sha256 is {digest}, expected {MERGES_SHA256}; reinstall minigpt2")
    merges = [a + b for a, b in merges_of(contents)]
    vocabulary = [*(LETTERS[b] for b in BYTES), *merges, "<|endoftext|>"]
    files = {VOCAB: json.dumps({text: i for i, text in enumerate(vocabulary)}).encode(), MERGES: contents}
    tokens = [bytes([b]) for b in BYTES] + [bytes_of(merge) for merge in merges]
    special = {"<|endoftext|>": Special(END_OF_TEXT)}
    return Tokenizer(tokens[256:], {token: i for i, token in enumerate(tokens)}, {}, special, END_OF_TEXT, files)


def merges_of(contents: bytes) -> list[tuple[str, str]]:
    """The pairs of a merges.txt."""
    lines = contents.decode("utf-8").split("\n")
    return [pair_of(line.rstrip("\r")) for line in lines if line.strip() and not line.startswith("#version")]


def pair_of(merge: Any) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise TokenizerError(f"a merge is {merge!r}, expected two tokens")
    return parts[0], parts[1]


def bytes_of(text: str) -> bytes:
    """The bytes that letters stand for; of a text that has others, its own."""
    try:
        return text.translate(_FROM_LETTERS).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()


def letters_of(token: bytes) -> str:
    return "".join(LETTERS[b] for b in token)
