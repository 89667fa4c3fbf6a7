"""Prompts from the command line, files, pipes and terminals."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
import torch
from terminal import on_a_terminal
from tiny_runs import environment

from minigpt2 import GPT2, GPT2Config
from minigpt2 import __main__ as cli

TEXT = "Once upon a time, é"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model that has the whole vocabulary, and a context of 32 tokens."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    GPT2(GPT2Config(n_positions=32, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def generated(model, monkeypatch, capsys):
    """generated(word, ..., stdin=bytes) -> (exit status, standard output, standard error) of generate."""

    def run(*words: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        given = ["--model", model, "--max-new-tokens", "6", "--seed", "1", *map(str, words)]
        monkeypatch.setattr(sys, "argv", ["minigpt2", "generate", *given])
        return (cli.main(), *capsys.readouterr())

    return run


def test_a_prompt_is_read_from_a_file_and_from_standard_input(generated, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    expected = generated("--prompt", TEXT)
    assert expected[::2] == (0, "")
    assert expected[1].startswith(TEXT)
    for contents in (TEXT, TEXT + "\n", TEXT + "\r\n", "\ufeff" + TEXT):
        file.write_bytes(contents.encode())
        assert generated("--file", file) == expected
        assert generated(stdin=contents.encode()) == expected
        assert generated("--file", "-", stdin=contents.encode()) == expected
    assert generated("--prompt", TEXT, stdin=b"another text") == expected
    assert generated(stdin=(TEXT + "\n\n").encode())[1].startswith(TEXT + "\n")  # only the last newline is the file's


def test_from_nothing_a_text_begins(generated) -> None:
    status, out, err = expected = generated("--prompt", "")
    assert (status, err) == (0, "")
    assert len(out) > 1
    assert "endoftext" not in out
    assert generated("--prompt", "<|endoftext|>") == generated(stdin=b"") == generated(stdin=b"\n") == expected


def test_several_samples_differ_and_the_first_is_that_of_one(generated) -> None:
    alone = generated("--prompt", TEXT)[1]
    status, out, err = generated("--prompt", TEXT, "--num", 3)
    assert (status, err) == (0, "")
    samples = out.split("--- sample ")[1:]
    assert [sample.splitlines()[0] for sample in samples] == ["1 of 3 ---", "2 of 3 ---", "3 of 3 ---"]
    texts = [sample.partition("\n")[2] for sample in samples]
    assert texts[0] == alone
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["--file", "nothing.txt"], b"", "nothing.txt"),
        (["--file", os.curdir], b"", os.curdir),
        ([], b"caf\xe9", "standard input: not UTF-8 text"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_one_clear_line(generated, words, stdin, message) -> None:
    status, out, err = generated(*words, stdin=stdin)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.fixture
def conversation():
    """conversation(model, typed, word, ...) -> (exit status, what a terminal shows) of generate without a prompt."""

    def run(model: object, typed: list[str], *words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "minigpt2", "generate", "--model", str(model), "--attention", "sdpa"]
        return on_a_terminal([*command, "--max-new-tokens", "6", "--seed", "1", *words], environment(), typed)

    return run


def test_on_a_terminal_what_is_typed_is_continued_until_ctrl_d(model, conversation, generated) -> None:
    status, shown = conversation(model, ["The cat\n", "\n", "and " * 40 + "\n", "\x04"])
    assert status == 0
    first, second = (turn.split("\r\n", 1)[1].rstrip("\r\n") for turn in shown.split("> ")[1:3])
    alone = generated("--prompt", "The cat", "--attention", "sdpa")[1].rstrip("\n")
    assert "The cat" + first == alone.replace("\n", "\r\n")
    assert second
    assert shown.count("\n> ") == 4
    assert "minigpt2:" not in shown  # such as that 40 words are too many: the model sees the last of them


def test_an_error_on_a_terminal_does_not_end_the_conversation(model, conversation, tmp_path: Path) -> None:
    spoiled = GPT2.from_pretrained(model)
    torch.nn.init.constant_(spoiled.ln_f.bias, float("nan"))
    spoiled.save_pretrained(tmp_path)
    status, shown = conversation(tmp_path, ["The cat\n", "The dog\n", "\x04"])
    assert status == 0
    assert shown.count("minigpt2: the logits are not finite: ln_f.bias holds a NaN") == 2


def test_several_samples_need_a_text(model, conversation) -> None:
    status, shown = conversation(model, [], "--num", "2")
    assert (status, shown) == (2, "minigpt2: --num 2 needs a text to continue: give --prompt or --file\r\n")
