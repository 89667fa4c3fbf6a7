"""From text to text with a tokenizer of the checkpoint's own; and what a run saves, in transformers' own hands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from fuzz_tokenizer import rule
from other_tokenizers import TEXT, train_pair, train_whole
from test_tokenizer import TEXTS
from tiny_runs import run_here

from minigpt2 import GPT2, GPT2Config, __main__
from minigpt2.data.batches import open_tokens
from minigpt2.tokenizer import Tokenizer
from minigpt2.tokenizer_files import read_tokenizer

SHAPE = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--length", "32", "--batch", "2", "--device", "cpu"]
SHORT = ["--max-steps", "2", "--eval-every", "1", "--eval-batches", "1", "--lr", "0.01"]
FILES = {"config.json", "generation_config.json", "merges.txt", "model.safetensors", "vocab.json"}


def text_file(folder: Path) -> str:
    path = folder / "text.txt"
    path.write_text(TEXT * 10, encoding="utf-8")
    return str(path)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer of 320 tokens, whose end-of-text is token 0."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_positions": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}
    GPT2(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "own")
    train_pair(tmp_path / "own")
    return tmp_path / "own"


def tokenizer_in(folder: Path) -> Tokenizer:
    found = read_tokenizer(folder)
    assert found is not None
    return found


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["minigpt2", *map(str, words)])
    return (__main__.main(), *capsys.readouterr())


def test_a_run_opens_in_transformers_with_nothing_added(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_here("--data", text_file(tmp_path), "--out", str(out), *SHAPE, *SHORT)
    for folder in (out, out / "best"):
        assert FILES | {"tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert (len(theirs), theirs.eos_token_id, theirs.model_max_length) == (50257, 50256, 32)
    ours = rule()
    for text in [TEXT, *TEXTS[:-1]]:  # the last is no UTF-8
        ids = ours.encode(text, allowed_special="all")
        assert theirs(text, verbose=False).input_ids == ids
        assert theirs.decode(ids) == text
    pipeline = transformers.pipeline("text-generation", model=str(out), device="cpu")
    for prompt in ("Hello", "a longer prompt, of some more words"):
        (answer,) = pipeline(prompt)
        assert answer["generated_text"].startswith(prompt)
        new = len(theirs(answer["generated_text"]).input_ids) - len(theirs(prompt).input_ids)
        assert new >= 1
    (answer,) = pipeline("Hello", max_new_tokens=5, do_sample=False, return_full_text=False)
    ids = torch.tensor([ours.encode("Hello")])
    assert answer["generated_text"] == ours.decode(
        GPT2.from_pretrained(out).generate(ids, 5, temperature=0)[0, 1:].tolist()
    )


def test_a_fine_tuned_checkpoint_keeps_its_tokenizer(tmp_path: Path, own: Path) -> None:
    out = tmp_path / "run"
    printed = run_here("--data", text_file(tmp_path), "--init", str(own), "--out", str(out), "--length", "32", *SHORT)
    assert "a sample of its text" in printed
    before = tokenizer_in(own)
    tokens = open_tokens(out / "tokens" / "train.bin")
    assert before.decode(tokens.tolist()).startswith(TEXT[:500])
    assert tokens.max() < 320
    for folder in (out, out / "best", out / "tokens"):
        assert tokenizer_in(folder).fingerprint == before.fingerprint
    for path in (out / "tokens" / "tokens.json", out / "train_config.json"):
        assert json.loads(path.read_text())["tokenizer"] == before.fingerprint
    state = json.loads((out / "snapshots" / "step-00000002" / "state.json").read_text())
    assert state["data"]["tokenizer"] == before.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert [theirs(text).input_ids for text in TEXTS[:-1]] == [before.encode(text) for text in TEXTS[:-1]]
    (answer,) = transformers.pipeline("text-generation", model=str(out), device="cpu")("The cats")
    assert answer["generated_text"].startswith("The cats")


def test_generate_and_eval_take_the_checkpoints_tokenizer(tmp_path, own, monkeypatch, capsys) -> None:
    status, out, _ = command(
        monkeypatch,
        capsys,
        "generate",
        "--model",
        own,
        "--prompt",
        "The cats",
        "--max-new-tokens",
        8,
        "--temperature",
        0,
    )
    tokenizer = tokenizer_in(own)
    ids = tokenizer.encode("The cats")
    expected = GPT2.from_pretrained(own).generate(torch.tensor([ids]), 8, temperature=0, eos_token_id=0)[0].tolist()
    assert (status, out) == (0, tokenizer.decode(i for i in expected if i) + "\n")
    status, out, _ = command(monkeypatch, capsys, "eval", "--model", own, "--data", text_file(tmp_path))
    assert status == 0
    count = len(tokenizer.encode(TEXT * 10))
    assert f"{count} tokens, {len((TEXT * 10).encode())} bytes" in out


def test_tokens_of_one_tokenizer_are_refused_by_models_of_another(tmp_path, own, monkeypatch, capsys) -> None:
    text, folder = text_file(tmp_path), tmp_path / "tokens"
    prepare = ("prepare", "--data", text, "--out", folder)
    assert command(monkeypatch, capsys, *prepare, "--tokenizer", own)[0] == 0
    mine = tokenizer_in(own).fingerprint
    for words in (prepare, (*prepare, "--tokenizer", tmp_path)):  # OpenAI's; and none
        status, _, err = command(monkeypatch, capsys, *words)
        assert status == 2
        assert (f"holds tokens of the tokenizer {mine}, not of OpenAI's" in err) or "there is no tokenizer.json" in err
    GPT2(GPT2Config(n_positions=32, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "openai")
    status, _, err = command(monkeypatch, capsys, "eval", "--model", tmp_path / "openai", "--data", folder / "val.bin")
    assert (status, err.count("\n")) == (2, 1)
    assert f"holds tokens of the tokenizer {mine}, not of OpenAI's tokenizer" in err
    mixed = [
        "--data",
        str(folder),
        "--init",
        str(tmp_path / "openai"),
        "--out",
        str(tmp_path / "run"),
        "--length",
        "32",
    ]
    assert "not of OpenAI's tokenizer" in run_here(*mixed, *SHORT, status=2)
    assert command(monkeypatch, capsys, "eval", "--model", own, "--data", folder / "val.bin")[0] == 0


def test_renewed_tokens_leave_no_other_tokenizer(tmp_path, own, monkeypatch, capsys) -> None:
    text, folder = text_file(tmp_path), tmp_path / "tokens"
    prepare = ("prepare", "--data", text, "--out", folder, "--renew")
    assert command(monkeypatch, capsys, *prepare, "--tokenizer", own)[0] == 0
    assert tokenizer_in(folder).fingerprint == tokenizer_in(own).fingerprint
    assert command(monkeypatch, capsys, *prepare)[0] == 0
    assert read_tokenizer(folder) is None
    assert open_tokens(folder / "train.bin").max() >= 320
    assert command(monkeypatch, capsys, *prepare, "--tokenizer", own)[0] == 0
    assert open_tokens(folder / "train.bin").max() < 320


@pytest.mark.filterwarnings("ignore:.*a run that has not ended")
def test_the_snapshots_of_a_run_have_its_tokenizer(tmp_path, own, monkeypatch, capsys) -> None:
    text, out = text_file(tmp_path), tmp_path / "run"
    common = ["--length", "32", *SHORT]
    run_here("--data", text, "--init", str(own), "--out", str(out), *common)
    moved = (out / "snapshots" / "step-00000002").rename(tmp_path / "moved")
    assert tokenizer_in(moved).fingerprint == tokenizer_in(own).fingerprint
    (out / "model.safetensors").unlink()  # as in a run that was stopped after its first snapshot
    generate = ("generate", "--prompt", "The cats", "--max-new-tokens", 8)
    for place in (moved, out):
        status, printed, _ = command(monkeypatch, capsys, *generate, "--model", place)
        assert (status, printed[:8]) == (0, "The cats")
        assert command(monkeypatch, capsys, "eval", "--model", place, "--data", text)[0] == 0
        run_here("--data", text, "--init", str(place), "--out", str(tmp_path / f"from {place.name}"), *common)


def test_a_fresh_model_takes_the_vocabulary_of_its_token_files(tmp_path, monkeypatch, capsys) -> None:
    train_whole(tmp_path / "own", added=("<|user|>",))
    text, folder, out = text_file(tmp_path), tmp_path / "tokens", tmp_path / "run"
    assert (
        command(monkeypatch, capsys, "prepare", "--data", text, "--out", folder, "--tokenizer", tmp_path / "own")[0]
        == 0
    )
    run_here("--data", str(folder), "--out", str(out), *SHAPE, *SHORT)
    config = GPT2Config.from_file(out / "config.json")
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (321, 0, 0)
    assert tokenizer_in(out).encode("<|user|>") == [320]


def test_a_model_of_an_unknown_tokenizer_takes_token_files_only(tmp_path, monkeypatch, capsys) -> None:
    sizes = {"vocab_size": 97, "n_positions": 32, "n_layer": 1, "n_head": 1, "n_embd": 8}
    GPT2(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).save_pretrained(tmp_path / "own")
    (tmp_path / "tokens").mkdir()
    for name in ("train.bin", "val.bin"):
        (np.arange(1000, dtype="<u2") % 97).tofile(tmp_path / "tokens" / name)
    common = ["--init", str(tmp_path / "own"), "--length", "32", *SHORT]
    printed = run_here("--data", str(tmp_path / "tokens"), "--out", str(tmp_path / "run"), *common)
    assert "a sample" not in printed
    assert not (tmp_path / "run" / "vocab.json").exists()
    said = run_here("--data", text_file(tmp_path), "--out", str(tmp_path / "other"), *common, status=2)
    assert "own has no tokenizer, and a vocabulary of 97 is not OpenAI's: it takes token files only" in said
    assert not (tmp_path / "other").exists()
    for verb, words in (("generate", ("--prompt", "a")), ("eval", ("--data", text_file(tmp_path)))):
        status, _, err = command(monkeypatch, capsys, verb, "--model", tmp_path / "own", *words)
        assert (status, err.count("\n")) == (2, 1)
        assert "own has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt is there" in err


def test_a_run_is_not_resumed_with_another_tokenizer(tmp_path: Path, own: Path) -> None:
    out = tmp_path / "run"
    run_here("--data", text_file(tmp_path), "--init", str(own), "--out", str(out), "--length", "32", *SHORT)
    config = json.loads((out / "vocab.json").read_text(encoding="utf-8"))
    config["<|end|>"] = config.pop("<|endoftext|>")
    (out / "vocab.json").write_text(json.dumps(config), encoding="utf-8")
    assert "holds tokens of the tokenizer" in run_here("--out", str(out), "--resume", status=2)
