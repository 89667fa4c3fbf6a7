"""Tokenizers other than OpenAI's, in the files that tokenizers and transformers write."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers

TEXT = (
    "The cats sat on the mats, naïve façade, 漢字 and 👩‍🚀; they'll say: don't. \n\n\tdef f(x):\n    return x + 10\n"
    * 5
)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, from its encoder.py."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def train_pair(folder: Path, n: int = 320, special: tuple[str, ...] = ("<|endoftext|>",)) -> Tokenizer:
    """Train a tokenizer of n tokens, its special ones first; write its vocab.json and merges.txt."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=n, special_tokens=list(special), show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
    return trained._tokenizer


def train_whole(folder: Path, n: int = 320, added: tuple[AddedToken | str, ...] = ()) -> Tokenizer:
    """The same, but that it writes tokenizer.json, with `added` tokens after the others."""
    trained = train_pair(folder, n)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    trained.add_special_tokens(list(added))
    trained.save(str(folder / "tokenizer.json"))
    return trained


def random_pair(folder: Path, rng: random.Random, letters: str = "abc ") -> Tokenizer:
    """A tokenizer of merges at random, some of which never apply, and of ids in no order, and its pair of files."""
    alphabet = byte_letters()
    tokens, merges = [alphabet[ord(letter)] for letter in letters], []
    for _ in range(rng.randrange(1, 25)):
        pair = rng.choice(tokens), rng.choice(tokens)
        if pair not in merges and len("".join(pair)) < 12:
            merges.append(pair)
            tokens += [] if "".join(pair) in tokens else ["".join(pair)]
    vocabulary = [*alphabet.values(), *(t for t in tokens if len(t) > 1), "<|endoftext|>"]
    rng.shuffle(vocabulary)
    ids = {text: i for i, text in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
