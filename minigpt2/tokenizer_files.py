"""Tokenizers that checkpoints bring with them: from their tokenizer.json, or their vocab.json and merges.txt."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tiktoken_ext.openai_public import r50k_pat_str

from minigpt2.tokenizer import (
    BYTES,
    END_OF_TEXT,
    LETTERS,
    MERGES,
    MERGES_FILE,
    SETTINGS,
    VOCAB,
    Special,
    Tokenizer,
    TokenizerError,
    bytes_of,
    get_tokenizer,
    letters_of,
    merges_of,
    pair_of,
)

__all__ = ["FILES", "find_tokenizer", "load_tokenizer", "read_tokenizer"]

WHOLE = "tokenizer.json"
FILES = (VOCAB, MERGES, WHOLE, SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""What a tokenizer is read from, and what is written again with it."""

# Tokenizers of other kinds, which transformers would read.
OTHER_KINDS = ("vocab.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model")

# The classes that mean by vocab.json and merges.txt what GPT-2 means. Others change the text before, or add tokens.
PAIR_KINDS = ("GPT2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend")

# The pattern as tokenizer.json may spell it out: as published in GPT-2's encoder.py, and as tiktoken has it.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PADDED_VOCABULARY = 50304
"""What OpenAI's 50257 ids are often padded to: a multiple of 128."""


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint: as `find_tokenizer`, but it raises TokenizerError where that finds none."""
    found = find_tokenizer(folder, vocab_size)
    if found is None:
        raise TokenizerError(
            f"{folder} has no tokenizer: neither {WHOLE} nor {VOCAB} and {MERGES} is there, and a vocabulary of "
            f"{vocab_size} is not that of OpenAI's (50257, or padded to {PADDED_VOCABULARY})"
        )
    return found


def find_tokenizer(folder: str | Path | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in a folder, for a model with that vocabulary; OpenAI's where there is none and the vocabulary is
    that of OpenAI's, which may be padded; None where it is another.

    Raises TokenizerError for one that cannot be read as it is meant, or that has ids beyond the vocabulary.
    """
    found = None if folder is None else read_tokenizer(folder)
    if found is None:
        return get_tokenizer() if END_OF_TEXT < vocab_size <= PADDED_VOCABULARY else None
    if found.ordinary > vocab_size:
        raise TokenizerError(
            f"{folder}: the tokenizer has ids up to {found.ordinary - 1}, the model's vocabulary {vocab_size} tokens"
        )
    if found.n_vocab > vocab_size:
        found.limit = vocab_size
    return found


def read_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer whose files are in a folder: tokenizer.json, or vocab.json and merges.txt; with its special tokens.
    None if there is none. Raises TokenizerError for one that is not a byte-level byte-pair encoding with GPT-2's
    pattern, or that is damaged."""
    folder = Path(folder)
    present = [name for name in (*FILES, *OTHER_KINDS) if (folder / name).is_file()]
    files = {name: (folder / name).read_bytes() for name in present if name in FILES}
    try:
        settings = _object(files, SETTINGS)
        named = _object(files, "special_tokens_map.json") | settings
        if WHOLE in files:
            vocabulary, merges, added = _whole(_object(files, WHOLE))
        elif VOCAB in files and MERGES in files and _kind(settings) in PAIR_KINDS:
            vocabulary, merges, added = _object(files, VOCAB), merges_of(files[MERGES]), {}
        else:
            _refuse_half(present, settings)
            return None
        for key in ("add_prefix_space", "add_bos_token", "add_eos_token"):
            if settings.get(key):
                raise TokenizerError(f"{SETTINGS}: {key} is true, and only false is implemented")
        extra = {text: {"id": i} for text, i in _object(files, "added_tokens.json").items()}
        extra |= {t["content"]: t | {"id": int(i)} for i, t in settings.get("added_tokens_decoder", {}).items()}
        return _assembled(vocabulary, merges, extra | added, named, files)
    except TokenizerError as error:
        raise TokenizerError(f"{folder}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"{folder}: the tokenizer's files cannot be read: {error!r}"[:400]) from None


def _refuse_half(present: list[str], settings: dict[str, Any]) -> None:
    """Raise TokenizerError if files without a vocabulary of this kind are signs of one of another."""
    signs = [name for name in present if name in (VOCAB, MERGES, *OTHER_KINDS)]
    if signs or _kind(settings) not in PAIR_KINDS or settings.get("added_tokens_decoder"):
        raise TokenizerError(
            f"the tokenizer ({', '.join([_kind(settings), *signs])}) cannot be read: it takes {WHOLE}, or {VOCAB} and "
            f"{MERGES} of a {PAIR_KINDS[0]}"
        )


def _kind(settings: dict[str, Any]) -> str:
    """The name of its class, in the slow form that transformers has for those that are also fast."""
    return str(settings.get("tokenizer_class") or PAIR_KINDS[0]).removesuffix("Fast")


def _object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in a file; an empty one where the file is not."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def _whole(contents: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, dict[str, Any]]]:
    """Vocabulary, merges and added tokens of a tokenizer.json. Raises TokenizerError for what is not as in GPT-2."""
    model, split, after = contents["model"], contents.get("pre_tokenizer"), contents.get("post_processor")
    problems = []
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        problems.append(f"its model is {model.get('type')!r}, not BPE")
    problems += [
        f"its model has {key}={model[key]!r}"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
        if model.get(key)
    ]
    if contents.get("normalizer") is not None:
        problems.append(f"it has the normalizer {contents['normalizer'].get('type')}")
    steps = split.get("pretokenizers", [split]) if split else []
    *before, last = steps or [{}]
    spelt_out = [
        s.get("type") == "Split" and s.get("pattern", {}).get("Regex") in (PATTERN, r50k_pat_str) for s in before
    ]
    spelt_out += [s.get("behavior") == "Isolated" and not s.get("invert") for s in before]
    if last.get("type") != "ByteLevel" or not all(spelt_out) or bool(before) == last.get("use_regex", True):
        kinds = [str(step.get("type")) for step in steps]
        problems.append(
            f"its pre-tokenizer ({', '.join(kinds) or 'none'}) is not the byte-level one with GPT-2's pattern"
        )
    elif last.get("add_prefix_space"):
        problems.append("its pre-tokenizer has add_prefix_space=true")
    afters = after.get("processors", [after]) if after else []
    for step in afters:
        nothing = all("Sequence" in piece for piece in step.get("single", [{}]))
        if step.get("type") != "ByteLevel" and not (step.get("type") == "TemplateProcessing" and nothing):
            problems.append(f"its post-processor {step.get('type')} adds tokens")
    if problems:
        raise TokenizerError(f"{WHOLE}: {'; '.join(problems)}: not implemented")
    return (
        model["vocab"],
        [pair_of(m) for m in model["merges"]],
        {t["content"]: t for t in contents["added_tokens"] or []},
    )


def _assembled(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    added: dict[str, dict[str, Any]],
    named: dict[str, Any],
    files: dict[str, bytes],
) -> Tokenizer:
    """The tokenizer of what its files say. `named` has its special tokens by their roles, such as eos_token."""
    numbers = [*vocabulary.values(), *(token["id"] for token in added.values())]
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in numbers):
        raise TokenizerError("not every token id is an integer from 0 to 2**31 - 1")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise TokenizerError("two tokens have one id")
    missing = [b for b in BYTES if LETTERS[b] not in vocabulary]
    if missing:
        raise TokenizerError(f"{len(missing)} of the 256 bytes are no tokens, the first of them {missing[0]:#04x}")
    if len(set(merges)) < len(merges):
        raise TokenizerError("a merge is there twice")
    for a, b in merges:
        if a + b not in vocabulary:
            raise TokenizerError(f"the merge of {a!r} and {b!r} makes no token of the vocabulary")
    made = [bytes_of(merge) for merge in _that_apply(merges)]
    ids = {bytes([b]): vocabulary[LETTERS[b]] for b in BYTES} | {m: vocabulary[letters_of(m)] for m in made}
    used = set(ids.values())
    others = {i: bytes_of(text) for text, i in vocabulary.items() if i not in used}
    for text in ["<|endoftext|>", *_contents(named)]:
        if text in vocabulary:
            added.setdefault(text, {"id": vocabulary[text]})
    flags = ("lstrip", "rstrip", "single_word")
    special = {t: Special(v["id"], *(bool(v.get(flag)) for flag in flags)) for t, v in added.items() if t}
    known = vocabulary | {text: token.id for text, token in special.items()}
    ends = [*_contents({"eos_token": named.get("eos_token")}), "<|endoftext|>", "</s>"]
    found = [known[text] for text in ends if text in known]
    return Tokenizer(made, ids, others, special, found[0] if found else None, files)


def _contents(named: dict[str, Any]) -> Iterator[str]:
    """The texts of the special tokens that have roles, such as eos_token, alone or in lists."""
    for role, value in named.items():
        if role.endswith(("_token", "_special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str):
                    yield text


def _that_apply(merges: list[tuple[str, str]]) -> list[str]:
    """The results of the merges, in order, less those that no text leads to.

    tiktoken merges whatever two neighbours make a token, a merge only the two that it names. That is the same: where a
    token's own letters end as two neighbours, merges before it have made them, and always the same two. If those are
    not the ones that the merge names, it never applies.
    """
    if merges == _official_merges():
        return [a + b for a, b in merges]
    ranks: dict[str, int] = {}
    missed: set[str] = set()  # tokens that a merge named before they were made
    for a, b in merges:
        missed |= {part for part in (a, b) if len(part) > 1 and part not in ranks}
        if _merged(a + b, ranks) == [a, b]:
            ranks[a + b] = len(ranks)
            if a + b in missed:
                raise TokenizerError(f"a merge of {a + b!r} with another token comes before it is made")
    return list(ranks)


def _merged(letters: str, ranks: dict[str, int]) -> list[str]:
    """The tokens that byte-pair encoding makes of some letters."""
    parts, never = list(letters), len(ranks)
    while len(parts) > 1:
        found = [ranks.get(a + b, never) for a, b in pairwise(parts)]
        best = min(found)
        if best == never:
            break
        i = found.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@functools.cache
def _official_merges() -> list[tuple[str, str]]:
    return merges_of(MERGES_FILE.read_bytes())
