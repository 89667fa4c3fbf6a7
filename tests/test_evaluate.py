"""Sliding windows: every token is scored once, as one at a time would score it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt2 import GPT2, GPT2Config
from minigpt2.__main__ import main
from minigpt2.data.batches import DataError
from minigpt2.evaluate import evaluate, tokens_of, windows
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer

LENGTH = 16
CONFIG = GPT2Config(n_positions=LENGTH, n_layer=2, n_head=2, n_embd=8, initializer_range=0.5)
TEXT = "Every token is scored once, naïvely or not: the results — à la bonne heure — agree. " * 2


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(CONFIG).eval()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.array(get_tokenizer().encode(TEXT), dtype=np.uint16)


@torch.no_grad()
def naive(model: GPT2, tokens: np.ndarray, stride: int) -> float:
    """One token at a time, from the logits, in float64. Its context starts at the first multiple of `stride` from which
    it can be reached."""
    ids = torch.tensor([END_OF_TEXT, *tokens.tolist()])
    total = 0.0
    for i in range(len(tokens)):
        start = max(0, -(-(i + 1 - LENGTH) // stride)) * stride
        logits = model(ids[None, start : i + 1])[0, -1].double()
        total -= torch.log_softmax(logits, 0)[tokens[i]].item()
    return total / len(tokens)


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
@pytest.mark.parametrize("batch", [1, 4])
def test_equals_one_token_at_a_time(model: GPT2, tokens: np.ndarray, stride: int, batch: int) -> None:
    result = evaluate(model, tokens, stride=stride, batch=batch)
    assert result.loss == pytest.approx(naive(model, tokens, stride), abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.tokens == len(tokens)
    assert result.bytes == len(TEXT.encode())
    assert result.bits_per_byte == pytest.approx(result.loss * len(tokens) / math.log(2) / len(TEXT.encode()))


def test_more_context_is_another_result(model: GPT2, tokens: np.ndarray) -> None:
    """The test above can tell strides apart."""
    losses = [evaluate(model, tokens, stride=stride).loss for stride in (1, 3, 8, 16)]
    assert all(abs(a - b) > 1e-4 for i, a in enumerate(losses) for b in losses[:i])


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_every_token_is_in_one_window(n: int, stride: int) -> None:
    scored = [i for w in windows(n, LENGTH, stride) for i in range(w.stop - w.scored, w.stop)]
    assert scored == list(range(n))
    for window in windows(n, LENGTH, stride):
        assert window.stop - window.start <= LENGTH
        assert window.start <= window.stop - window.scored
        assert window.start == 0 or window.stop - window.scored - window.start >= LENGTH - stride


def test_a_short_text(model: GPT2) -> None:
    tokens = np.array([7], dtype=np.uint16)
    assert evaluate(model, tokens).loss == pytest.approx(naive(model, tokens, 8), abs=1e-6)


def test_draws_nothing_and_leaves_the_mode(tokens: np.ndarray) -> None:
    model = GPT2(CONFIG.replace(embd_pdrop=0.5)).train()
    state = torch.get_rng_state()
    assert evaluate(model, tokens).loss == evaluate(model, tokens).loss
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def modes(model: GPT2) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_module_keeps_its_mode_also_when_it_fails(tokens: np.ndarray) -> None:
    model = GPT2(CONFIG).train()
    model.h[1].mlp.eval()
    before = modes(model)
    evaluate(model, tokens)
    assert modes(model) == before
    with pytest.raises(ValueError, match="60000 is "):
        evaluate(model, np.array([1, 60000, 2]))
    assert modes(model) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_proj.bias", "ln_f.weight"])
def test_weights_that_are_not_finite_are_named(tokens: np.ndarray, name: str, value: float) -> None:
    model = GPT2(CONFIG)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"{name} holds a NaN or an infinity"):
        evaluate(model, tokens)


def test_a_model_that_overflows_says_so(tokens: np.ndarray) -> None:
    model = GPT2(CONFIG)
    with torch.no_grad():
        model.ln_f.weight.fill_(1e38)
        model.wte.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf): .* overflows torch\.float32"):
        evaluate(model, tokens)


def test_ids_after_those_of_the_tokenizer_have_a_loss_and_no_bytes(tokens: np.ndarray) -> None:
    model = GPT2(CONFIG.replace(vocab_size=50304))
    result = evaluate(model, np.array([*tokens, 50300], dtype=np.uint16))
    assert result.tokens == len(tokens) + 1
    assert result.bytes == len(TEXT.encode())


def test_mistakes(model: GPT2, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="the context length; got stride 17, length 16"):
        evaluate(model, tokens, stride=17)
    with pytest.raises(ValueError, match="got stride 8, length 17"):
        evaluate(model, tokens, length=17)
    with pytest.raises(DataError, match="no tokens"):
        evaluate(model, tokens[:0])


def test_text_and_token_files_have_the_same_tokens(tmp_path: Path, tokens: np.ndarray) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    tokens.tofile(tmp_path / "text.bin")
    for name in ("text.txt", "text.bin"):
        with tokens_of(tmp_path / name) as found:
            assert np.array_equal(found, tokens)


def test_command(model: GPT2, tokens: np.ndarray, tmp_path: Path, monkeypatch, capsys) -> None:
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    argv = ["minigpt2", "eval", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt")]
    monkeypatch.setattr("sys.argv", argv)
    assert main() == 0
    result = evaluate(model, tokens)
    printed = capsys.readouterr().out
    assert f"loss {result.loss:.6f} nats per token, perplexity {result.perplexity:.4f}" in printed
    assert f"bits per byte {result.bits_per_byte:.6f}, {len(tokens)} tokens, {len(TEXT.encode())} bytes" in printed
    monkeypatch.setattr("sys.argv", [*argv[:-1], str(tmp_path / "nothing.txt")])
    assert main() == 2
