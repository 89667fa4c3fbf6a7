"""Agreement with transformers on what a GPT-2 of the hub may set, in files that it wrote with each setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hugging_face import random_hf
from torch import Tensor

from minigpt2 import GPT2
from minigpt2.ops.attention import BACKENDS
from minigpt2.recompute import RECOMPUTE

transformers = pytest.importorskip("transformers")

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"activation_function": name} for name in ("gelu", "relu", "silu", "tanh")},
    "scores not scaled": {"scale_attn_weights": False, "initializer_range": 0.01},
    "scores scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "scaled by layer alone": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    "a head of its own": {"tie_word_embeddings": False},
    "a narrow MLP": {"n_inner": 40},
    "many at once": {
        **{"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
        **{"n_inner": 80, "layer_norm_epsilon": 1e-3, "vocab_size": 97, "eos_token_id": [5, 7]},
    },
}


@pytest.fixture(scope="module", params=SETTINGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = {"vocab_size": 211, "n_positions": 192, "n_embd": 64, "n_layer": 3, "n_head": 4}
    random_hf(transformers.GPT2Config(**shape | SETTINGS[request.param])).save_pretrained(folder)
    return folder


def reference_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """In eager attention, as the default, sdpa, ignores the scale of the scores in transformers 4 and 5.0; without
    reorder_and_upcast_attn, by which eager computes scores in float32 whatever the dtype."""
    settings = {"attn_implementation": "eager", "reorder_and_upcast_attn": False}
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype, **settings).eval()


def ids(length: int) -> Tensor:
    return torch.randint(97, (2, length), generator=torch.Generator().manual_seed(0))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_logits(checkpoint: Path, dtype: torch.dtype, bound: float) -> None:
    expected = reference_of(checkpoint, dtype)(ids(70)).logits
    for backend in BACKENDS:
        logits = GPT2.from_pretrained(checkpoint, attention=backend, dtype=dtype)(ids(70))
        assert relative(logits, expected) < bound, backend


def test_loss_and_every_gradient_at_every_notch(checkpoint: Path) -> None:
    tokens, reference = ids(40), reference_of(checkpoint, torch.float64)
    theirs = reference(tokens, labels=tokens)
    expected = F.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())  # theirs is in float32
    expected.backward()
    gradients = {name.removeprefix("transformer."): p.grad for name, p in reference.named_parameters()}
    model = GPT2.from_pretrained(checkpoint, dtype="float64")
    found = []
    for model.checkpoint_every, model.recompute in [(k, recompute) for k in range(4) for recompute in RECOMPUTE]:
        model.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        assert all(map(torch.equal, found[-1], found[0])), (model.checkpoint_every, model.recompute)
    assert found[0][0].item() == pytest.approx(expected.item(), rel=1e-12)
    assert found[0][0].item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert [name for name, _ in model.named_parameters()] == list(gradients)
    for (name, theirs), ours in zip(gradients.items(), found[0][1:], strict=True):
        assert relative(ours, theirs) < 1e-11, name


@pytest.mark.parametrize("padded", [False, True], ids=["prompts", "left-padded batch"])
def test_greedy_generation(checkpoint: Path, padded: bool) -> None:
    prompt = ids(12)
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0 if padded else 1
    reference = reference_of(checkpoint)
    settings = {"attention_mask": mask, "max_new_tokens": 150, "do_sample": False, "pad_token_id": 0}
    expected = reference.generate(prompt, eos_token_id=None, **settings)
    model = GPT2.from_pretrained(checkpoint)
    assert torch.equal(model.generate(prompt, 150, temperature=0, attention_mask=mask), expected)


def test_generation_ends_at_any_of_several_ids(checkpoint: Path) -> None:
    prompt, reference, model = ids(12)[:1], reference_of(checkpoint), GPT2.from_pretrained(checkpoint)
    free = model.generate(prompt, 40, temperature=0)[0, 12:].tolist()
    ends = [free[-1], free[20]]
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    expected = reference.generate(prompt, eos_token_id=ends, **settings)
    found = model.generate(prompt, 40, temperature=0, eos_token_id=ends)
    assert torch.equal(found, expected)
    assert found.size(1) == 12 + 1 + min(map(free.index, ends))


def test_it_is_saved_as_transformers_reads_it(checkpoint: Path, tmp_path: Path) -> None:
    GPT2.from_pretrained(checkpoint).save_pretrained(tmp_path)
    theirs, again = reference_of(checkpoint), reference_of(tmp_path)
    assert torch.equal(theirs(ids(9)).logits, again(ids(9)).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", ["1MB", "50KB"])
def test_files_of_half_precision_and_in_shards(tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
    shape = {
        "vocab_size": 211,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "tie_word_embeddings": False,
    }
    reference = random_hf(transformers.GPT2Config(**shape)).to(dtype)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard == "1MB" else 8)
    expected = reference.float()(ids(20)).logits
    assert relative(GPT2.from_pretrained(tmp_path)(ids(20)), expected) < 2e-5


def test_the_form_that_older_releases_wrote(checkpoint: Path) -> None:
    """What config.json said up to transformers 4: the dtype by another name, and notes of the library."""
    values = json.loads((checkpoint / "config.json").read_text())
    values |= {"torch_dtype": values.pop("dtype"), "_name_or_path": "a", "n_ctx": 192, "_num_labels": 2}
    for name, default in (("tie_word_embeddings", True), ("n_inner", None), ("scale_attn_weights", True)):
        if values.get(name) == default:
            values.pop(name, None)
    expected = GPT2.from_pretrained(checkpoint)(ids(9))
    (checkpoint / "config.json").write_text(json.dumps(values))
    assert torch.equal(GPT2.from_pretrained(checkpoint)(ids(9)), expected)
    assert relative(expected, reference_of(checkpoint)(ids(9)).logits) < 2e-5
