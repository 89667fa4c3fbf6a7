"""Texts of every kind through the tokenizer, against tiktoken with the published pattern and against the tokenizers
library. Run by hand: python tests/fuzz_tokenizer.py --n 10000 --seed 0"""

from __future__ import annotations

import base64
import codecs
import functools
import random
import sys
from collections import Counter
from pathlib import Path

import tiktoken
from fuzzing import Finding, main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minigpt2.evaluate import bytes_of_tokens
from minigpt2.tokenizer import END_OF_TEXT, RANKS_FILE, get_tokenizer

# As published in the encoder.py of GPT-2.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def ranks():
    lines = RANKS_FILE.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def rule():
    """tiktoken, with the published pattern."""
    return tiktoken.Encoding(
        "rule", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={"<|endoftext|>": END_OF_TEXT}
    )


def byte_letters():
    """GPT-2's printable stand-in for each byte, from its encoder.py."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def merged_from(token, ranks):
    """The two halves that byte-pair encoding joins last to make `token`."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 30))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def hugging_face():
    """Hugging Face's implementation, from vocabulary and merges rebuilt out of the ranks."""
    letters, by_rank = byte_letters(), ranks()
    written = {token: "".join(letters[b] for b in token) for token in by_rank}
    merges = [tuple(written[part] for part in merged_from(token, by_rank)) for token in by_rank if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab={written[token]: rank for token, rank in by_rank.items()}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


rule, hugging_face, bytes_of_tokens = map(functools.cache, (rule, hugging_face, bytes_of_tokens))

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


def case(rng: random.Random, counts: Counter[str]) -> None:
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
    if int(bytes_of_tokens()[ids].sum()) != len(whole.encode()):
        raise Finding(f"the tokens of {text!r} have another number of bytes")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(tokenizer.decode_single_token_bytes(i)) for i in ids]
    if "".join(pieces) + decoder.decode(b"", final=True) != whole:
        raise Finding(f"{text!r} is streamed as something else")
    if END_OF_TEXT in ids:
        raise Finding(f"{text!r} ends a document")
    counts["surrogates" if whole != text else "special" if "<|endoftext|>" in text else "plain"] += 1


if __name__ == "__main__":
    main(case)
