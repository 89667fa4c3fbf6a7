"""OpenAI's tokenizer against tiktoken's own rule and against the tokenizers library, both from the files that it saves,
which are the published ones."""

import copy
import multiprocessing
import pickle
import socket

import pytest
from fuzz_tokenizer import hugging_face, ranks, rule
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2 import tokenizer as module
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, my dog is a little",
    "don't we'll I'VE they're\tx  y   z \n\n  \r\n",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # a comment\n\n\nclass A:\n\tpass\n",
    "naïve façade — „Größe“ 東京 ไทย עברית 🇩🇪👩‍👩‍👧‍👦🏽 e\u0301 \u200d\ufeff\x00\x7f",
    "1234567890 ½ Ⅷ ٣ 3.14e-10",
    "<|endoftext|>",
    "one<|endoftext|>two <|endoftext|",
    "broken\ud800surrogate.",
]
PIECES = "ab'stlre \n\t.0é漢👩\u200d<|>"


def test_an_id_beyond_the_tokenizer_stands_for_no_character():
    tokenizer = get_tokenizer()
    assert [tokenizer.token_bytes(i) for i in (0, END_OF_TEXT)] == [b"!", b"<|endoftext|>"]
    assert tokenizer.token_bytes(50257) == tokenizer.token_bytes(60000) == b"\xff"


def test_published_facts():
    tokenizer = get_tokenizer()
    assert tokenizer.n_vocab == 50257
    assert tokenizer.end_of_text == tokenizer.separator == END_OF_TEXT == 50256
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("The dog was found in a field") == [464, 3290, 373, 1043, 287, 257, 2214]


def test_every_token_is_decoded_to_its_bytes():
    tokenizer = get_tokenizer()
    assert {tokenizer.token_bytes(i): i for i in range(50256)} == ranks()


def check(text):
    """A lone surrogate is U+FFFD, and <|endoftext|> is text like any other."""
    tokenizer, whole = get_tokenizer(), text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer.encode_ordinary(text)
    assert ids == rule().encode(text, disallowed_special=()) == hugging_face().encode(whole).ids
    assert ids == tokenizer.encode_document(text).tolist()
    assert END_OF_TEXT not in ids
    assert tokenizer.decode(ids) == whole


@pytest.mark.parametrize("text", TEXTS)
def test_it_equals_both_references(text):
    check(text)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=st.text() | st.text(PIECES, max_size=60) | st.text(st.characters(exclude_categories=())))
def test_it_equals_both_references_on_any_text(text):
    check(text)


@pytest.mark.parametrize("letter", ["a", " ", "\n", "0", "!", "é", "👩"])
def test_a_megabyte_of_one_letter(letter):
    text = letter * (1_000_000 // len(letter.encode()))
    assert get_tokenizer().decode(get_tokenizer().encode_ordinary(text)) == text


def test_a_megabyte_of_letters_is_encoded_as_its_rule_says():
    # aaaa is a token and nothing longer is
    assert get_tokenizer().encode_ordinary("a" * 1_000_000) == [24794] * 250_000


def test_end_of_text_is_one_token_in_a_prompt_and_text_in_a_document():
    text, tokenizer = "a<|endoftext|>b", get_tokenizer()
    assert tokenizer.encode(text) == rule().encode(text, allowed_special="all") == [64, END_OF_TEXT, 65]
    assert END_OF_TEXT not in tokenizer.encode_document(text)


@pytest.fixture
def uncached():
    get_tokenizer.cache_clear()
    yield
    get_tokenizer.cache_clear()


@pytest.mark.usefixtures("uncached")
def test_an_altered_file_of_merges_is_refused(monkeypatch, tmp_path):
    altered = tmp_path / "gpt2.bpe"
    altered.write_bytes(module.MERGES_FILE.read_bytes() + b"\n")
    monkeypatch.setattr(module, "MERGES_FILE", altered)
    with pytest.raises(RuntimeError, match=f"{altered}: sha256 is .* expected {module.MERGES_SHA256}"):
        get_tokenizer()


@pytest.mark.usefixtures("uncached")
def test_no_network_and_no_cache_folder_are_used(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "TMPDIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    assert get_tokenizer().encode("Hello world") == [15496, 995]
    assert list(tmp_path.iterdir()) == []


def test_it_is_made_once():
    assert get_tokenizer() is get_tokenizer()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_is_the_same_tokenizer(duplicate):
    twin = duplicate(get_tokenizer())
    assert twin.encode_ordinary("<|endoftext|>Hello") == get_tokenizer().encode_ordinary("<|endoftext|>Hello")
    assert twin.n_vocab == 50257


def test_it_works_in_another_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(get_tokenizer().encode, ["Hello world"]) == [[15496, 995]]
