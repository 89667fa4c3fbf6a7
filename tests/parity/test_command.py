"""`minigpt2 parity`: it passes where the two agree, and names the module where one was changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hugging_face import random_hf
from other_tokenizers import TEXT, train_pair
from torch import Tensor, nn

from minigpt2 import GPT2
from minigpt2 import __main__ as cli
from minigpt2.tokenizer_files import load_tokenizer

transformers = pytest.importorskip("transformers")

from minigpt2.parity import Parity, _text, compare  # noqa: E402 (nothing of it without transformers)

IDS = torch.randint(503, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Which is faster for models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def silent(line: str) -> None:
    pass


def compared(folder: Path, change: Callable[[GPT2], Any], dtype: torch.dtype = torch.float32) -> Parity:
    """The comparison of a folder with itself, after a change of minigpt2's model."""
    settings: dict[str, Any] = {"attn_implementation": "eager", "reorder_and_upcast_attn": False}
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype, **settings).eval()
    ours = GPT2.from_pretrained(folder, dtype=dtype)
    change(ours)
    return compare(ours, theirs, IDS, say=silent)


@torch.no_grad()
def add_to(parameter: Tensor, value: float = 1e-3) -> None:
    parameter.view(-1)[-5] += value


def erf_gelu(model: GPT2) -> None:
    mlp = model.h[2].mlp
    mlp.forward = lambda x: mlp.c_proj(F.gelu(mlp.c_fc(x)))


def exchange_norms(model: GPT2) -> None:
    block = model.h[1]
    block.ln_1, block.ln_2 = block.ln_2, block.ln_1


def read_norms_in_the_other_order(model: GPT2) -> None:
    block = model.h[1]

    def forward(x: Tensor, *rest: Any) -> Tensor:
        x = x + block.attn(block.ln_2(x), *rest)
        return x + block.mlp(block.ln_1(x))

    block.forward = forward


def normalise_afterwards(model: GPT2) -> None:
    block = model.h[1]

    def forward(x: Tensor, *rest: Any) -> Tensor:
        x = block.ln_1(x + block.attn(x, *rest))
        return block.ln_2(x + block.mlp(x))

    block.forward = forward


def mlp_beside_attention(model: GPT2) -> None:
    block = model.h[0]
    block.forward = lambda x, *rest: x + block.attn(block.ln_1(x), *rest) + block.mlp(block.ln_2(x))


def scale_the_residual(model: GPT2) -> None:
    model.h[1].register_forward_hook(lambda module, args, y: y * 1.0001)


def overflow(model: GPT2) -> None:
    model.h[2].mlp.register_forward_hook(lambda module, args, y: y / 0)


def scale_attention(model: GPT2) -> None:
    def larger_queries(module: nn.Module, args: Any, qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        return torch.cat([1.001 * q, k, v], dim=-1)

    model.h[1].attn.c_attn.register_forward_hook(larger_queries)


def one_parameter_more(model: GPT2) -> None:
    model.h[1].attn.register_parameter("gate", nn.Parameter(torch.zeros(1)))


FAULTS: dict[str, tuple[Callable[[GPT2], Any], str]] = {
    "one weight": (lambda m: add_to(m.h[1].mlp.c_fc.weight), "h.1.mlp"),
    "the last digit of a bias": (lambda m: add_to(m.h[2].attn.c_attn.bias, 1e-8), "h.2.attn"),
    "a weight of a LayerNorm": (lambda m: add_to(m.h[0].ln_2.weight), "h.0.ln_2"),
    "a position": (lambda m: add_to(m.wpe.weight), "wpe"),
    "a token that the text lacks": (lambda m: add_to(m.wte.weight), "wte"),
    "the first epsilon": (lambda m: setattr(m.h[0].ln_1, "eps", 1.1e-5), "h.0.ln_1"),
    "an epsilon": (lambda m: setattr(m.h[1].ln_2, "eps", 1e-6), "h.1.ln_2"),
    "the last epsilon": (lambda m: setattr(m.ln_f, "eps", 1e-6), "ln_f"),
    "the form of the GELU": (erf_gelu, "h.2.mlp"),
    "LayerNorms exchanged": (exchange_norms, "h.1.ln_1"),
    "LayerNorms read in the other order": (read_norms_in_the_other_order, "h.1.ln_1"),
    "LayerNorms after what they belong before": (normalise_afterwards, "h.1.ln_1"),
    "MLP beside attention": (mlp_beside_attention, "h.0.ln_2"),
    "the scale of attention": (scale_attention, "h.1.attn"),
    "one parameter more": (one_parameter_more, "h.1.attn"),
    "a division by zero": (overflow, "h.2.mlp"),
    "what a block returns": (scale_the_residual, "h.1"),
}


@pytest.mark.parametrize(("change", "part"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_by_its_module(hf_tiny: Path, change: Callable[[GPT2], Any], part: str) -> None:
    found = compared(hf_tiny, change)
    assert found.faults[0].part == part
    assert found.verdict.startswith(f"FAIL: {part} is the first that differs: ")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_fault_is_named_in_other_dtypes(hf_tiny: Path, dtype: torch.dtype) -> None:
    for change, part in (
        (normalise_afterwards, "h.1.ln_1"),
        (lambda m: add_to(m.h[1].attn.c_proj.weight, 0.1), "h.1.attn"),
        (lambda m: setattr(m.h[1].ln_2, "eps", 1e-6), "h.1.ln_2"),
    ):
        assert compared(hf_tiny, change, dtype).faults[0].part == part


def test_an_epsilon_is_seen_where_the_stream_is_large(hf_tiny: Path, tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(hf_tiny)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1000)
    model.save_pretrained(tmp_path)
    assert compared(tmp_path, lambda m: None).verdict == "PASS"
    assert compared(tmp_path, lambda m: setattr(m.h[1].ln_1, "eps", 2e-5)).faults[0].part == "h.1.ln_1"


SETTINGS: list[dict[str, Any]] = [
    {"activation_function": "gelu"},
    {"activation_function": "relu"},
    {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    {"scale_attn_weights": False},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_other_settings_of_the_configuration(hf_tiny: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = transformers.GPT2Config.from_pretrained(hf_tiny)
    config.update(settings)
    random_hf(config).save_pretrained(tmp_path)
    assert compared(tmp_path, lambda m: None).verdict == "PASS"
    assert compared(tmp_path, scale_attention).faults[0].part == "h.1.attn"
    if not config.tie_word_embeddings:
        assert compared(tmp_path, lambda m: add_to(m.lm_head.weight)).faults[0].part == "lm_head"


def test_where_the_residual_stream_first_exceeds_its_bound(hf_tiny: Path) -> None:
    numbers = compared(hf_tiny, erf_gelu).numbers
    assert numbers["first_over_bound"] == "h.2"
    assert [row["relative"] <= row["bound"] for row in numbers["residual_stream"]] == [True, True, True, False]


def wrong_gradient(model: GPT2) -> None:
    model.h[1].attn.c_proj.bias.register_hook(lambda gradient: gradient * 1.001)


def wrong_loss(model: GPT2) -> None:
    loss = model.loss
    model.loss = lambda *args, **kwargs: loss(*args, **kwargs) * 1.00001


def wrong_mean(model: GPT2) -> None:
    loss = model.loss
    model.loss = lambda *args, reduction="mean": (
        loss(*args, reduction=reduction) * (1.001 if reduction == "mean" else 1)
    )


def ignored_mask(model: GPT2) -> None:
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None: forward(input_ids)


def wrong_logits(model: GPT2) -> None:
    model.register_forward_hook(lambda module, args, logits: logits * 1.00001)


def wrong_generation(model: GPT2) -> None:
    generate = model.generate

    def another(prompt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens = generate(prompt, *args, **kwargs)
        tokens[:, -1] += 1
        return tokens % 503

    model.generate = another


def inexact_recomputation(model: GPT2) -> None:
    """A second run in each step that is not like the first."""
    runs = []

    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        runs.append(1)
        return y * (1 + 1e-6 * (len(runs) > 1)) if model.training else y

    def step_begins(module: nn.Module, args: Any) -> None:
        runs.clear()

    model.h[0].ln_1.register_forward_hook(hook)
    model.wte.register_forward_pre_hook(step_begins)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (wrong_gradient, "h.1.attn.c_proj.bias"),
        (lambda m: m.h[0].attn.c_proj.weight.requires_grad_(False), "h.0.attn.c_proj.weight"),
        (wrong_loss, "loss"),
        (wrong_mean, "loss"),
        (wrong_logits, "lm_head"),
        (ignored_mask, "padded batch"),
        (wrong_generation, "greedy text"),
        (inexact_recomputation, "the dial at checkpoint_every=1, recompute='block'"),
    ],
)
def test_what_only_another_check_sees(hf_tiny: Path, change: Callable[[GPT2], Any], part: str) -> None:
    assert compared(hf_tiny, change).faults[0].part == part


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.filterwarnings("ignore:attention takes the slower sdpa path:UserWarning")
def test_the_command_passes(hf_tiny: Path, monkeypatch, capsys, dtype: str, attention: str) -> None:
    assert command(monkeypatch, hf_tiny, "--dtype", dtype, "--attention", attention) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "PASS"
    assert [line.split()[0] for line in lines if line.startswith("h.")][:3] == ["h.0", "h.1", "h.2"]
    assert "notches of the dial that are bit-equal: 12 of 12" in lines


def command(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["minigpt2", "parity", *map(str, words)])
    return cli.main()


def test_the_command_fails_with_status_1(hf_tiny: Path, monkeypatch, capsys) -> None:
    load = GPT2.from_pretrained

    def changed(*args: Any, **kwargs: Any) -> GPT2:
        model = load(*args, **kwargs)
        erf_gelu(model)
        return model

    monkeypatch.setattr(GPT2, "from_pretrained", changed)
    assert command(monkeypatch, hf_tiny) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("FAIL: h.2.mlp is the first that differs: ")
    assert "first over its bound: h.2\n" in out
    assert command(monkeypatch, hf_tiny, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passes"], found["first"]["part"]) == (False, "h.2.mlp")


def test_json(hf_tiny: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    assert command(monkeypatch, hf_tiny, "--json", "--data", tmp_path / "text.txt", "--length", 16) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passes"], found["first"], found["verdict"]) == (True, None, "PASS")
    assert [row["part"] for row in found["residual_stream"]] == ["wte + wpe", "h.0", "h.1", "h.2"]
    assert [row["part"] for row in found["residual_stream"][1]["modules"]] == [
        f"h.0.{part}" for part in ("ln_1", "attn", "ln_2", "mlp")
    ]
    assert {row["part"] for row in found["gradients"]} == set(GPT2.from_pretrained(hf_tiny).state_dict())
    shares = [row["relative"] / row["bound"] for row in found["gradients"]]
    assert shares == sorted(shares, reverse=True)
    assert abs(found["loss"]["minigpt2"] - found["loss"]["transformers"]) < 1e-5
    assert found["greedy"] == {"tokens": 32, "equal": 32}
    assert found["dial"] == {"notches": 12, "differing": []}


def test_a_folder_with_a_tokenizer_of_its_own(tmp_path: Path, monkeypatch, capsys) -> None:
    own = train_pair(tmp_path)
    random_hf(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=320)).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert command(monkeypatch, tmp_path, "--data", tmp_path / "text.txt", "--length", 32) == 0
    assert "32 tokens of " in capsys.readouterr().out
    ids = _text(tmp_path / "text.txt", load_tokenizer(tmp_path, 320), 32)
    assert ids.flatten().tolist() == own.encode(TEXT).ids[:64]


def test_mistakes(hf_tiny: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "short.txt").write_text("in")
    for words, said in (
        ((tmp_path / "nothing",), "neither an official name"),
        ((hf_tiny, "--dtype", "int8"), "int8"),
        ((hf_tiny, "--attention", "flash"), "flash"),
        ((hf_tiny, "--data", tmp_path / "nothing.txt"), "nothing.txt"),
        ((hf_tiny, "--data", tmp_path / "short.txt"), "tokens are too few; 4 are the least"),
        ((hf_tiny, "--length", 1), "2 tokens are the least that have a loss; got a length of 1"),
    ):
        assert command(monkeypatch, *words) == 2, words
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), err
        assert said in err


def test_weights_that_overflow_or_are_not_finite(hf_tiny: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(hf_tiny)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "large")
    assert command(monkeypatch, tmp_path / "large", "--dtype", "float16") == 2
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    capsys.readouterr()
    assert command(monkeypatch, tmp_path / "nan") == 2
    assert "h.1.mlp.c_proj.weight holds a NaN or an infinity" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [{"n_embd": 4, "n_head": 1}, {"n_embd": 48, "n_head": 3, "n_layer": 5}])
@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_rounding_passes_at_other_shapes_and_sizes(tmp_path: Path, shape: dict[str, int], scale: float) -> None:
    config = transformers.GPT2Config(**{"vocab_size": 503, "n_positions": 24, "n_layer": 2} | shape)
    model = random_hf(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert compared(tmp_path, lambda m: None, dtype).verdict == "PASS"
