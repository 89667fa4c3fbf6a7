"""Agreement with transformers' GPT2LMHeadModel, on checkpoints that its own save_pretrained wrote."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import random_hf
from torch import Tensor

from minigpt2 import GPT2, GPT2Config, KVCache
from minigpt2.config import OFFICIAL_SIZES
from minigpt2.ops.attention import BACKENDS

transformers = pytest.importorskip("transformers")

SIZES = ["gpt2", *(pytest.param(name, marks=pytest.mark.large) for name in OFFICIAL_SIZES if name != "gpt2")]


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random model of an official shape, in which every parameter counts, saved by transformers."""
    if request.param == "gpt2":
        yield request.getfixturevalue("hf_124m")
        return
    folder = tmp_path_factory.mktemp(request.param)
    random_hf(transformers.GPT2Config(**OFFICIAL_SIZES[request.param])).save_pretrained(folder)
    gc.collect()
    yield folder
    shutil.rmtree(folder)  # gigabytes; pytest keeps its folders for a while


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(50257, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over norm of the reference `b`."""
    return float((a - b).norm() / b.norm())


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-5), pytest.param(torch.float64, 1e-12, marks=pytest.mark.slow)]
)
def test_logits(checkpoint: Path, dtype: torch.dtype, bound: float) -> None:
    tokens = ids(2, 96)
    reference = load_reference(checkpoint, dtype)(tokens).logits
    for backend in BACKENDS:
        model = GPT2.from_pretrained(checkpoint, attention=backend, dtype=dtype)
        assert relative(model(tokens), reference) < bound, backend
        del model  # gpt2-xl in float64 fits once


def test_loss_and_every_gradient(checkpoint: Path) -> None:
    tokens = ids(2, 64)
    labels = tokens.clone()
    labels[0, :10] = -100
    reference = load_reference(checkpoint)
    expected = reference(tokens, labels=labels).loss
    expected.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    expected = expected.detach()
    del reference
    gc.collect()
    model = GPT2.from_pretrained(checkpoint)
    loss = model.loss(tokens[:, :-1], labels[:, 1:])
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    ours = dict(model.named_parameters())
    assert {f"transformer.{name}" for name in ours} == set(gradients)
    for name, parameter in ours.items():
        assert parameter.grad is not None
        assert relative(parameter.grad, gradients[f"transformer.{name}"]) < 1e-5, name


@torch.no_grad()
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(checkpoint: Path) -> None:
    tokens = ids(3, 40)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, :7], mask[2, :33] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    reference = load_reference(checkpoint)
    expected = reference(tokens, attention_mask=mask, position_ids=positions).logits
    alone = [reference(tokens[row : row + 1, pad:]).logits[0] for row, pad in enumerate((0, 7, 33))]
    del reference
    for backend in BACKENDS:
        logits = GPT2.from_pretrained(checkpoint, attention=backend)(tokens, attention_mask=mask)
        assert logits.isfinite().all()
        for row, pad in enumerate((0, 7, 33)):
            assert relative(logits[row, pad:], expected[row, pad:]) < 2e-5, (backend, row)
            assert relative(logits[row, pad:], alone[row]) < 2e-5, (backend, row)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["one prompt", "left-padded batch"])
def test_greedy_generation_over_200_tokens(checkpoint: Path, padded: bool) -> None:
    n = 200
    prompt = ids(2 if padded else 1, 12, seed=1)
    mask = torch.ones_like(prompt)
    if padded:
        mask[0, :5] = 0
    reference = load_reference(checkpoint)
    expected = reference.generate(
        prompt, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=50256, eos_token_id=None
    )
    del reference
    model = GPT2.from_pretrained(checkpoint)
    assert torch.equal(model.generate(prompt, n, temperature=0, attention_mask=mask), expected)
    # Without a cache: every prefix at once, since a causal model's logits at t are those of the prefix that ends there.
    with torch.no_grad():
        full_mask = torch.cat([mask, mask.new_ones(len(mask), n - 1)], dim=1)
        greedy = model(expected[:, :-1], attention_mask=full_mask if padded else None).argmax(-1)
    assert torch.equal(greedy[:, -n:], expected[:, -n:])


@torch.no_grad()
def test_a_prompt_in_pieces_through_the_cache(checkpoint: Path) -> None:
    tokens = ids(2, 150)
    model = GPT2.from_pretrained(checkpoint)
    expected = model(tokens)
    cache = KVCache(model, 2, 160)
    pieces = [model(piece, cache=cache) for piece in tokens.split([64, 1, 60, 25], dim=1)]
    assert relative(torch.cat(pieces, dim=1), expected) < 2e-5
    assert cache.length == 150


@torch.no_grad()
def test_greedy_generation_without_a_cache_token_by_token() -> None:
    """The literal loop, at a shape where it is affordable."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=64, vocab_size=503, n_positions=256)
    config.bos_token_id = config.eos_token_id = None
    reference = transformers.GPT2LMHeadModel(config).eval()
    for parameter in reference.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = GPT2(GPT2Config.from_dict(reference.config.to_diff_dict())).eval()
    model.load_state_dict(
        {k.removeprefix("transformer."): v for k, v in reference.state_dict().items() if "lm_head" not in k}
    )
    tokens = prompt = torch.randint(503, (2, 9))
    for _ in range(200):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    mask = torch.ones_like(prompt)
    expected = reference.generate(prompt, attention_mask=mask, max_new_tokens=200, do_sample=False, use_cache=False)
    assert torch.equal(tokens, expected)
    assert torch.equal(model.generate(prompt, 200, temperature=0), expected)
