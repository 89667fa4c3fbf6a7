"""The model by itself: shapes, initialisation, dropout, and clear errors for input that does not fit."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from minigpt2 import GPT2, GPT2Config
from minigpt2.ops.attention import attention

CONFIG = GPT2Config(vocab_size=211, n_positions=32, n_embd=64, n_layer=4, n_head=4)


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(CONFIG)


def test_parameters_have_the_official_names_and_shapes(model: GPT2) -> None:
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(HFConfig(**CONFIG.to_dict()))
    official = {name.removeprefix("transformer."): p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == official
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)]
)
def test_official_sizes_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config.official(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_initialisation() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=999, n_embd=256, n_layer=8, n_head=4)
    for name, parameter in GPT2(config).named_parameters():
        if "ln_" in name or name.endswith("bias"):
            assert (parameter == (1.0 if "ln_" in name and name.endswith("weight") else 0.0)).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("place", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_each_dropout_acts_in_training_only(place: str, backend: str) -> None:
    off = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    model = GPT2(CONFIG.replace(**off | {place: 0.5}), attention=backend)
    ids = torch.randint(211, (2, 16))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_dropout_sits_on_the_embedding_and_on_what_each_half_of_a_block_adds() -> None:
    torch.manual_seed(0)
    model = GPT2(CONFIG.replace(embd_pdrop=0.5, resid_pdrop=0.25, attn_pdrop=0.0))
    for block in model.h:
        for half, value in ((block.attn, 1.0), (block.mlp, 10.0)):
            torch.nn.init.zeros_(half.c_proj.weight)
            torch.nn.init.constant_(half.c_proj.bias, value)
    stream = []
    hooks = [block.register_forward_pre_hook(lambda _, args: stream.append(args[0].detach())) for block in model.h]
    ids = torch.randint(211, (2, 30))
    model(ids)
    plain = model.wte(ids) + model.wpe(torch.arange(30))
    kept = stream[0] != 0
    torch.testing.assert_close(stream[0][kept], 2 * plain[kept])
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.04)
    for before, after in itertools.pairwise(stream):
        added = (after - before) * 0.75
        assert {round(x) for x in added.flatten().tolist()} == {0, 1, 10, 11}
        assert (added.round() == 11).float().mean().item() == pytest.approx(0.75**2, abs=0.04)
    for hook in hooks:
        hook.remove()


def test_a_position_sees_only_what_came_before(model: GPT2) -> None:
    model.eval()
    ids = torch.randint(211, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 211
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_the_loss_is_the_cross_entropy_of_the_logits(model: GPT2) -> None:
    model.eval()
    ids, targets = torch.randint(211, (2, 2, 20))
    targets[0, :7] = -100
    expected = torch.nn.functional.cross_entropy(model(ids).view(-1, 211), targets.view(-1))
    torch.testing.assert_close(model.loss(ids, targets), expected)


def test_all_ones_as_mask_change_nothing(model: GPT2) -> None:
    model.eval()
    ids = torch.randint(211, (2, 20))
    torch.testing.assert_close(model(ids, attention_mask=torch.ones_like(ids)), model(ids))


def test_padding_on_the_right_changes_nothing_before_it(model: GPT2) -> None:
    model.eval()
    ids, mask = torch.randint(211, (2, 20)), torch.ones(2, 20)
    mask[0, 12:] = 0
    logits = model(ids, attention_mask=mask)
    torch.testing.assert_close(logits[1], model(ids)[1])
    torch.testing.assert_close(logits[0, :12], model(ids[:1, :12])[0])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(5, dtype=torch.long), r"input_ids must be \(B, T\)"),
        (torch.zeros(1, 0, dtype=torch.long), r"input_ids must be \(B, T\)"),
        (torch.zeros(1, 5), "int64 or int32"),
        (torch.zeros(1, 33, dtype=torch.long), "33 tokens exceed the context length n_positions=32"),
        (torch.tensor([[3, 211]]), r"token id 211 is outside the vocabulary \[0, 211\)"),
        (torch.tensor([[-1, 5]]), "token id -1"),
    ],
)
def test_ids_that_do_not_fit(model: GPT2, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(ids)


def test_masks_and_targets_that_do_not_fit(model: GPT2) -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="targets must have the shape"):
        model.loss(ids, ids[:, 1:])


def test_backends_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"attention backend must be one of .*, got 'flash'"):
        GPT2(CONFIG, attention="flash")
    with pytest.raises(ValueError, match="attention backend"):
        attention(torch.zeros(1, 4, 48), 2, backend="")


@pytest.mark.parametrize("shape", [(4, 48), (1, 4, 50), (1, 4, 32)])
def test_projections_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"qkv must be \(B, T, 3C\)"):
        attention(torch.zeros(shape), 4)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_out_of_range(p: float) -> None:
    with pytest.raises(ValueError, match="dropout_p"):
        attention(torch.zeros(1, 4, 48), 2, dropout_p=p)


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton", "matplotlib", "transformers", "huggingface_hub"}
    heavy |= {"torch.utils.cpp_extension", "torch.utils.tensorboard", "torch.distributed.fsdp", "tiktoken", "tyro"}
    code = (
        f"import torch, sys; before = set(sys.modules); import minigpt2; print(({heavy} & set(sys.modules)) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
