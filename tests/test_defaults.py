"""PyTorch's default dtype and default device are the surroundings' business: nothing here depends on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minigpt2 import GPT2, GPT2Config, KVCache
from minigpt2.recompute import RECOMPUTE

CONFIG = GPT2Config(vocab_size=61, n_positions=48, n_embd=64, n_layer=2, n_head=2)  # every dropout at 0.1


def results(model: GPT2, ids: Tensor) -> list[Tensor]:
    """Loss and gradients with dropout, logits, greedy text alone and padded, and a prompt in pieces."""
    found = []
    model.train()
    for model.checkpoint_every, model.recompute in ((0, "block"), *((1, recompute) for recompute in RECOMPUTE)):
        model.zero_grad()
        torch.manual_seed(5)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    model.eval()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        found += [model(ids), model(ids, mask), model.generate(ids, 20, temperature=0)]
        found += [model.generate(ids, 8, temperature=0, attention_mask=mask)]
        generator = torch.Generator(device="cpu").manual_seed(3)
        found += [model.generate(ids, 8, top_k=5, top_p=0.9, generator=generator)]
        cache = KVCache(model, len(ids))
        found += [model(piece, cache=cache) for piece in ids.split(5, dim=1)]
    return found


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64, "meta"])
@pytest.mark.usefixtures("defaults")
def test_results_do_not_depend_on_the_defaults(default: torch.dtype | str, dtype: torch.dtype, attention: str) -> None:
    torch.manual_seed(0)
    model = GPT2(CONFIG, attention=attention).to(dtype)
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = results(model, ids)
    if isinstance(default, str):
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(default)
    found = results(model, ids)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, expected, strict=True))
