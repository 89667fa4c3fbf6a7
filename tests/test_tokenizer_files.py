"""Tokenizers that checkpoints bring with them, against transformers and the tokenizers library on the same files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from other_tokenizers import TEXT, random_pair, train_pair, train_whole
from test_tokenizer import TEXTS
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from minigpt2.tokenizer import Tokenizer, TokenizerError, get_tokenizer
from minigpt2.tokenizer_files import find_tokenizer, load_tokenizer, read_tokenizer

USER = (AddedToken("<|user|>"), AddedToken("<|user|>s"), AddedToken("<pad>"))
FLAGS = (
    AddedToken("<left>", lstrip=True),
    AddedToken("<right>", rstrip=True),
    AddedToken("<both>", lstrip=True, rstrip=True),
    AddedToken("word", single_word=True),
    AddedToken("<|a b|>"),
)
SPECIAL_TEXTS = [
    "<|user|>Hello<|user|>s there<|endoftext|>",
    "a <left> b  <right>\n\n c <both>  <both> d",
    " word words word.word sword <|a b|><pad>",
    "<|endoftext|>",
    "x<left>",
    "<right> <left> <right>",
]


def read(folder: Path) -> Tokenizer:
    found = read_tokenizer(folder)
    assert found is not None
    return found


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """The vocab.json and merges.txt of a small tokenizer."""
    train_pair(tmp_path / "pair")
    return tmp_path / "pair"


@pytest.mark.parametrize("text", [TEXT, *TEXTS])
def test_a_pair_of_files_encodes_as_its_library(pair: Path, text: str) -> None:
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    (pair / "config.json").write_text('{"model_type": "gpt2"}')
    ours, theirs = read(pair), AutoTokenizer.from_pretrained(pair)
    assert ours.encode(text) == theirs(whole).input_ids
    assert ours.decode(ours.encode(text)) == whole
    assert ours.n_vocab == len(theirs) == 320
    assert ours.end_of_text == theirs.eos_token_id == 0


@pytest.mark.parametrize("added", [USER, FLAGS], ids=["plain", "flags"])
@pytest.mark.parametrize("by", ["tokenizers", "transformers"])
def test_special_tokens_keep_their_meaning(tmp_path: Path, added: tuple[AddedToken, ...], by: str) -> None:
    theirs = train_whole(tmp_path, added=added)
    if by == "transformers":
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    ours = read(tmp_path)
    for text in [*SPECIAL_TEXTS, TEXT, *TEXTS[:-1]]:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.encode_document("<|user|>" if added is USER else "<left>").tolist() == [320]
    assert ours.end_of_text not in ours.encode_document("<|endoftext|>")
    assert len(ours.encode_ordinary("<|endoftext|>")) > 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32), texts=st.lists(st.text("abc ", max_size=40), max_size=20))
def test_merges_that_never_apply_and_ids_in_no_order_are_read_as_meant(tmp_path_factory, seed, texts) -> None:
    folder = tmp_path_factory.mktemp("random")
    theirs = random_pair(folder, random.Random(seed))
    try:
        ours = read(folder)
    except TokenizerError:  # a merge of a token that only a later one makes: few
        reject()
    assert [ours.encode_ordinary(text) for text in texts] == [theirs.encode(text).ids for text in texts]


def test_one_tokenizer_has_one_fingerprint_in_whatever_files(tmp_path: Path) -> None:
    train_whole(tmp_path)
    one = read(tmp_path)
    contents = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    model = contents["model"]
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    assert read(tmp_path).fingerprint == one.fingerprint
    train_pair(tmp_path / "pair")
    assert read(tmp_path / "pair").fingerprint == one.fingerprint
    train_pair(tmp_path / "larger", 321)
    assert read(tmp_path / "larger").fingerprint != one.fingerprint


def test_what_is_saved_is_the_same_tokenizer(tmp_path: Path) -> None:
    train_whole(tmp_path, added=FLAGS)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<left>"}')
    for i, folder in enumerate([tmp_path, tmp_path / "0", tmp_path / "1"]):
        read(folder).save(tmp_path / str(i), 77)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert kept.items() < {path.name: path.read_bytes() for path in (tmp_path / "2").iterdir()}.items()
    assert read(tmp_path / "2").fingerprint == read(tmp_path).fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path / "2")
    assert (theirs.eos_token, theirs.model_max_length) == ("<|endoftext|>", 77)
    assert [theirs(text).input_ids for text in SPECIAL_TEXTS] == [read(tmp_path).encode(t) for t in SPECIAL_TEXTS]


@pytest.mark.parametrize("form", ["text", "object", "map", "added_tokens.json"])
def test_the_end_of_text_is_the_one_that_is_named(tmp_path: Path, form: str) -> None:
    train_pair(tmp_path, special=("<s>", "<|endoftext|>", "</s>"))
    name = "special_tokens_map.json" if form == "map" else "tokenizer_config.json"
    (tmp_path / name).write_text(json.dumps({"eos_token": {"content": "</s>"} if form == "object" else "</s>"}))
    if form == "added_tokens.json":
        (tmp_path / name).write_text('{"eos_token": "<|im_end|>"}')
        (tmp_path / form).write_text('{"<|im_end|>": 320}')
    text, i = ("<|im_end|>", 320) if form == "added_tokens.json" else ("</s>", 2)
    assert (read(tmp_path).separator, read(tmp_path).encode(f"a{text}")[-1]) == (i, i)


def test_a_tokenizer_without_an_end_of_text_says_so_where_one_is_needed(tmp_path: Path) -> None:
    train_pair(tmp_path, special=("<pad>",))
    assert read(tmp_path).end_of_text is None
    with pytest.raises(TokenizerError, match="no end-of-text token: name it as eos_token"):
        _ = read(tmp_path).separator


def test_openais_files_are_openais_tokenizer(tmp_path: Path) -> None:
    get_tokenizer().save(tmp_path, 1024)
    assert read(tmp_path).fingerprint == get_tokenizer().fingerprint
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    assert read(tmp_path / "theirs").fingerprint == get_tokenizer().fingerprint


def test_a_folder_without_one_has_openais_where_the_vocabulary_is_that(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    for n in (50257, 50304):
        assert load_tokenizer(tmp_path, n) is get_tokenizer()
    for n in (97, 50256, 52000):
        assert find_tokenizer(tmp_path, n) is None
        with pytest.raises(TokenizerError, match=f"{tmp_path} has no tokenizer: .* a vocabulary of {n} is not"):
            load_tokenizer(tmp_path, n)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    train_whole(tmp_path, added=USER)
    with pytest.raises(TokenizerError, match="the tokenizer has ids up to 319, the model's vocabulary 319 tokens"):
        load_tokenizer(tmp_path, 319)
    found = load_tokenizer(tmp_path, 321)
    assert found.encode("<|user|>") == [320]
    with pytest.raises(TokenizerError, match=r"'<pad>' is token 322, .* has 321; model.resize_vocabulary\(323\)"):
        found.encode("a<pad>")


def changed(**changes):
    """Change the JSON of a file: changed(file, key=value), the key's dots as __."""

    def change(folder: Path) -> None:
        for path, value in changes.items():
            name, *keys = path.split("__")
            file = folder / f"{name}.json"
            contents = inner = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = value
            file.write_text(json.dumps(contents), encoding="utf-8")

    return change


def written(name: str, contents: str | bytes):
    return lambda folder: (folder / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())


def spelt(step) -> dict:
    return json.loads(step.__getstate__())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(tokenizer__model__type="WordPiece"), "its model is 'WordPiece', not BPE"),
        (changed(tokenizer__model__type="Unigram"), "its model is 'Unigram', not BPE"),
        (changed(tokenizer__model__dropout=0.1), "its model has dropout=0.1"),
        (changed(tokenizer__model__byte_fallback=True), "its model has byte_fallback=True"),
        (changed(tokenizer__model__ignore_merges=True), "its model has ignore_merges=True"),
        (changed(tokenizer__model__end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
        (changed(tokenizer__normalizer=spelt(normalizers.NFC())), "it has the normalizer NFC"),
        (changed(tokenizer__pre_tokenizer=None), r"its pre-tokenizer \(none\) is not the byte-level one"),
        (changed(tokenizer__pre_tokenizer=spelt(pre_tokenizers.Metaspace())), r"its pre-tokenizer \(Metaspace\)"),
        (changed(tokenizer__pre_tokenizer__use_regex=False), r"its pre-tokenizer \(ByteLevel\)"),
        (changed(tokenizer__pre_tokenizer__add_prefix_space=True), "its pre-tokenizer has add_prefix_space=true"),
        (
            changed(
                tokenizer__pre_tokenizer=spelt(
                    pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
                )
            ),
            r"its pre-tokenizer \(Digits, ByteLevel\)",
        ),
        (
            changed(
                tokenizer__post_processor=spelt(
                    processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
                )
            ),
            "its post-processor TemplateProcessing adds tokens",
        ),
        (changed(tokenizer_config__add_prefix_space=True), "tokenizer_config.json: add_prefix_space is true"),
        (changed(tokenizer_config__add_bos_token=True), "tokenizer_config.json: add_bos_token is true"),
        (changed(tokenizer__model__vocab={"a": 0}), "255 of the 256 bytes are no tokens"),
        (changed(tokenizer__model__merges=[["a", "b", "c"]]), r"a merge is \['a', 'b', 'c'\], expected two tokens"),
        (changed(tokenizer__model__merges=["a"]), "a merge is 'a', expected two tokens"),
        (changed(tokenizer__model__merges=["! !"]), "the merge of '!' and '!' makes no token of the vocabulary"),
        (changed(tokenizer__model__vocab__a=-1), "not every token id is an integer from 0 to"),
        (changed(tokenizer__model__vocab__a=1.5), "not every token id is an integer from 0 to"),
        (changed(tokenizer__model__vocab__a=300), "two tokens have one id"),
        (written("tokenizer.json", "{"), "tokenizer.json: cannot be read as JSON"),
        (written("tokenizer.json", "[" * 100_000), "cannot be read"),
        (written("tokenizer.json", b"\xff"), "tokenizer.json: cannot be read as JSON"),
        (written("tokenizer.json", "[]"), "tokenizer.json: expected a JSON object, found list"),
        (written("tokenizer.json", "{}"), "cannot be read: KeyError"),
        (written("tokenizer_config.json", '{"added_tokens_decoder": 3}'), "cannot be read"),
        (written("tokenizer_config.json", "["), "tokenizer_config.json: cannot be read as JSON"),
    ],
)
def test_a_tokenizer_json_that_is_not_as_in_gpt2_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    train_whole(tmp_path)
    change(tmp_path)
    with pytest.raises(TokenizerError, match=message) as error:
        find_tokenizer(tmp_path, 50257)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "merges.txt").unlink(),
            r"the tokenizer \(GPT2Tokenizer, vocab.json\) cannot be read: it takes",
        ),
        (
            lambda folder: (folder / "vocab.json").unlink(),
            r"the tokenizer \(GPT2Tokenizer, merges.txt\) cannot be read: it takes",
        ),
        (written("merges.txt", "#version: 0.2\na b c\n"), "a merge is 'a b c', expected two tokens"),
        (written("merges.txt", b"#version: 0.2\n\xff\n"), "cannot be read"),
        (written("merges.txt", "h e\nĠt he\nĠ t\n"), "a merge of 'Ġt' with another token comes before it is made"),
        (written("merges.txt", "Ġ t\nĠ t\n"), "a merge is there twice"),
        (written("vocab.json", '{"a": "b"}'), "not every token id is an integer"),
        (
            written("tokenizer_config.json", '{"tokenizer_class": "CLIPTokenizerFast"}'),
            r"the tokenizer \(CLIPTokenizer, vocab.json, merges.txt\) cannot be read",
        ),
    ],
)
def test_a_damaged_pair_is_refused(pair: Path, change, message: str) -> None:
    vocabulary = json.loads((pair / "vocab.json").read_text(encoding="utf-8")) | {"Ġthe": 400, "he": 401, "Ġt": 402}
    (pair / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    change(pair)
    with pytest.raises(TokenizerError, match=message):
        find_tokenizer(pair, 50257)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("vocab.txt", "[CLS]\n"),
        ("spiece.model", "\n"),
        ("tokenizer.model", "\n"),
        ("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"50257": {"content": "<|user|>"}}}'),
    ],
)
def test_a_tokenizer_of_another_kind_is_never_replaced_by_openais(tmp_path: Path, name: str, contents: str) -> None:
    (tmp_path / name).write_text(contents)
    with pytest.raises(
        TokenizerError, match=r"cannot be read: it takes tokenizer\.json, or vocab\.json and merges\.txt of"
    ):
        find_tokenizer(tmp_path, 50257)


def test_gpt2s_pattern_may_be_spelt_out(tmp_path: Path) -> None:
    train_whole(tmp_path)
    before = read(tmp_path).fingerprint
    contents = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    last = contents["pre_tokenizer"] | {"use_regex": False}
    contents["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, last]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    assert read(tmp_path).fingerprint == before
    split["pattern"] = {"Regex": r"\p{L}+"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(TokenizerError, match=r"its pre-tokenizer \(Split, ByteLevel\)"):
        read(tmp_path)


def test_a_copy_of_the_folder_is_the_same_tokenizer(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "copy")
    assert read(tmp_path / "copy").fingerprint == read(pair).fingerprint
