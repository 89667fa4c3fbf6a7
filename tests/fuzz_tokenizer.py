"""Texts of every kind through the tokenizer, against tiktoken with the published pattern and against the tokenizers
library. Run by hand: python tests/fuzz_tokenizer.py --n 10000 --seed 0"""

from __future__ import annotations

import codecs
import functools
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import tiktoken
from fuzzing import Finding, main
from numpy.typing import NDArray
from other_tokenizers import random_pair
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minigpt2.evaluate import bytes_of_tokens
from minigpt2.tokenizer import END_OF_TEXT, TokenizerError, get_tokenizer
from minigpt2.tokenizer_files import read_tokenizer

# The digests of GPT-2's vocab.bpe and encoder.json, as tiktoken publishes them.
PUBLISHED = (
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)

# As published in the encoder.py of GPT-2.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def ranks() -> dict[bytes, int]:
    """The ranks as tiktoken's loader reads them from the files that we save."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TIKTOKEN_CACHE_DIR": ""}):
        get_tokenizer().save(Path(folder))
        return data_gym_to_mergeable_bpe_ranks(f"{folder}/merges.txt", f"{folder}/vocab.json", *PUBLISHED)


def rule() -> tiktoken.Encoding:
    """tiktoken, with the published pattern."""
    return tiktoken.Encoding(
        "rule", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={"<|endoftext|>": END_OF_TEXT}
    )


def hugging_face() -> Tokenizer:
    """Hugging Face's implementation, from the files that we save."""
    with tempfile.TemporaryDirectory() as folder:
        get_tokenizer().save(Path(folder))
        model = models.BPE.from_file(f"{folder}/vocab.json", f"{folder}/merges.txt")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.cache
def sizes() -> NDArray[np.int64]:
    return bytes_of_tokens(get_tokenizer())


ranks, rule, hugging_face = map(functools.cache, (ranks, rule, hugging_face))

FRAGMENTS = [
    *[
        "'s",
        "'S",
        "'ll",
        "'LL",
        "'re",
        "\u2019s",
        " 's",
        "<|endoftext|>",
        "<|endoftext",
        "|>",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
    ],
    *["\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff", "\u0085", "\u2028", "\0", "\x7f", "e\u0301", "\u1e9b\u0323"],
    *[
        "\u0130",
        "\u00df",
        "\u0665",
        "\u00bd",
        "\u2167",
        "\u4e00",
        "\ud55c",
        "\u0e44\u0e17\u0e22",
        "\U0001f468\u200d\U0001f680",
    ],
    *[
        "\U0001f1e9",
        "\U0001f3fd",
        "\U000e0041",
        "\U0010ffff",
        "\ud800",
        "\udfff",
        "\ud83d\ude00",
        "0",
        "9" * 40,
        "a" * 99,
    ],
]


@functools.cache
def prose() -> str:
    """Text with code and words: this interpreter's own sources."""
    folder = Path(functools.__file__).parent
    return "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("functools.py", "textwrap.py"))


def stretch(rng: random.Random) -> str:
    n = rng.choice([0, 1, 2, 5, 20, 100])
    kind = rng.randrange(7)
    if kind == 0:
        return "".join(rng.choice(FRAGMENTS) for _ in range(n))
    if kind == 1:  # any code points, surrogates among them
        return "".join(chr(rng.randrange(sys.maxunicode + 1)) for _ in range(n))
    if kind == 2:
        return "".join(chr(rng.randrange(0x3000)) for _ in range(n))
    if kind == 3:
        start = rng.randrange(len(prose()))
        return prose()[start : start + 10 * n]
    if kind == 4:  # tokens in an order of no language
        ids = [rng.randrange(END_OF_TEXT) for _ in range(n)]
        return get_tokenizer().decode(ids)
    if kind == 5:
        return rng.randbytes(n).decode(rng.choice(["latin-1", "utf-8"]), "replace")
    return rng.choice(FRAGMENTS) * rng.choice([1, 10, 1000])


def other_tokenizer(rng: random.Random, counts: Counter[str]) -> None:
    """Merges at random, read from files, against the tokenizers library."""
    letters = rng.choice(["abc ", "ab", "e\n '"])
    with tempfile.TemporaryDirectory() as folder:
        theirs = random_pair(Path(folder), rng, letters)
        try:
            ours = read_tokenizer(folder)
        except TokenizerError as error:
            if "comes before it is made" not in str(error):
                raise
            counts["refused"] += 1
            return
    for _ in range(20):
        text = rng.choice([stretch(rng), "".join(rng.choice(letters) for _ in range(rng.randrange(40)))])
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if ours.encode_ordinary(text) != theirs.encode(whole).ids or ours.decode(ours.encode_ordinary(text)) != whole:
            raise Finding(f"{text!r} is encoded or decoded otherwise")
    counts["another tokenizer"] += 1


def case(rng: random.Random, counts: Counter[str]) -> None:
    if rng.randrange(10) == 0:
        other_tokenizer(rng, counts)
        return
    tokenizer = get_tokenizer()
    text = "".join(stretch(rng) for _ in range(rng.choice([1, 1, 2, 6])))
    ids = tokenizer.encode_ordinary(text)
    if ids != rule().encode(text, disallowed_special=()):
        raise Finding(f"tiktoken encodes {text!r} otherwise")
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # U+FFFD for lone surrogates
    if tokenizer.decode(ids) != whole:
        raise Finding(f"{text!r} is decoded to something else")
    if ids != hugging_face().encode(whole).ids:
        raise Finding(f"tokenizers encodes {text!r} otherwise")
    if int(sizes()[ids].sum()) != len(whole.encode()):
        raise Finding(f"the tokens of {text!r} have another number of bytes")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(tokenizer.token_bytes(i)) for i in ids]
    if "".join(pieces) + decoder.decode(b"", final=True) != whole:
        raise Finding(f"{text!r} is streamed as something else")
    if END_OF_TEXT in ids:
        raise Finding(f"{text!r} ends a document")
    counts["surrogates" if whole != text else "special" if "<|endoftext|>" in text else "plain"] += 1


if __name__ == "__main__":
    main(case)
