"""Weights in and out: what is read, what is refused and how it is named, and that nothing is lost."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import GPT2LMHeadModel

from minigpt2 import GPT2, ConfigError, WeightsError
from minigpt2.model import Projection

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IDS = torch.tensor([[1, 5, 9, 200, 3, 77]])


@pytest.fixture
def folder(hf_tiny, tmp_path):
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(hf_tiny, tmp_path / "checkpoint"))


@pytest.fixture
def official(folder):
    """The tensors of the copy under the names of the published gpt2 file: no prefix, no head."""
    return {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}


def rewrite(folder, tensors):
    # Anew: overwriting a file that a model still maps would change that model.
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


def same(model, tensors):
    ours = dict(model.named_parameters())
    return ours.keys() == tensors.keys() and all(torch.equal(ours[name], tensors[name]) for name in ours)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def problems_of(folder):
    with pytest.raises(WeightsError) as error:
        GPT2.from_pretrained(folder)
    return str(error.value)


def test_it_comes_in_evaluation_mode_and_can_be_trained(folder, official):
    model = GPT2.from_pretrained(folder)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert same(model, official)


def test_dials_and_overrides_reach_the_model(folder):
    model = GPT2.from_pretrained(str(folder), checkpoint_every=2, attention="eager", attn_pdrop=0.0)
    assert (model.checkpoint_every, model.h[0].attn.backend, model.config.attn_pdrop) == (2, "eager", 0.0)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("head", ["absent", "present", "only"])
def test_names_with_and_without_prefix_and_head(folder, official, prefix, head):
    tensors = {prefix + name: t for name, t in official.items()}
    if head != "absent":
        tensors["lm_head.weight"] = tensors[prefix + "wte.weight"].clone()
    if head == "only":
        del tensors[prefix + "wte.weight"]
    rewrite(folder, tensors)
    assert same(GPT2.from_pretrained(folder), official)


WRAPPERS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "DDP of torch.compile": lambda name: f"module._orig_mod.{name}",
    "Lightning, torch.compile and transformers": lambda name: f"model._orig_mod.transformer.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + re.sub("^(h[.][0-9]+[.])", r"\g<1>_fsdp_wrapped_module.", name),
    "blocks compiled, then checkpointed": lambda name: re.sub(
        "^(h[.][0-9]+[.])", r"\g<1>_checkpoint_wrapped_module._orig_mod.", name
    ),
}


@pytest.mark.parametrize("wrapped", WRAPPERS.values(), ids=WRAPPERS)
def test_names_of_the_usual_wrappers_are_understood(folder, official, wrapped):
    tensors = {wrapped(name): t for name, t in official.items()}
    tensors |= {wrapped("lm_head.weight"): official["wte.weight"].clone(), wrapped("h.0.attn.bias"): torch.ones(1)}
    rewrite(folder, tensors)
    assert same(GPT2.from_pretrained(folder), official)


def test_beside_a_missing_name_stands_the_one_most_like_it(folder, official):
    rewrite(folder, {f"backbone.{name}": t for name, t in official.items()})
    assert "wte.weight (503, 64) is missing (there is backbone.wte.weight)" in problems_of(folder)


def test_one_name_with_and_without_a_prefix_is_refused(folder, official):
    rewrite(folder, official | {"module.ln_f.bias": official["ln_f.bias"] + 1})
    assert "ln_f.bias is there twice, as 'ln_f.bias' and 'module.ln_f.bias'" in problems_of(folder)


def test_a_name_is_shown_in_one_line_of_some_length(folder, official):
    rewrite(folder, official | {"a\nb": torch.zeros(1), "c" * 10_000: torch.zeros(1)})
    text = problems_of(folder)
    assert "a\\nb is unexpected" in text
    assert len(text) < 1000


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_mask_buffers_are_skipped(folder, official, dtype, prefix, tiny_config):
    n = tiny_config.n_positions
    buffers = {}
    for i in range(tiny_config.n_layer):
        buffers[f"{prefix}h.{i}.attn.bias"] = torch.ones(n, n, dtype=dtype).tril().view(1, 1, n, n)
        buffers[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    rewrite(folder, {prefix + name: t for name, t in official.items()} | buffers)
    assert same(GPT2.from_pretrained(folder), official)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_any_float_dtype_is_read_into_any(folder, official, stored, wanted):
    tensors = {name: t.to(stored) for name, t in official.items()}
    rewrite(folder, tensors)
    model = GPT2.from_pretrained(folder, dtype=wanted)
    assert same(model, {name: t.to(wanted) for name, t in tensors.items()})


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_named(folder, name):
    assert GPT2.from_pretrained(folder, dtype=name).wte.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "int8", "bf16", "auto", "nn", None]
)
def test_a_dtype_that_no_model_has_is_refused_by_name(folder, dtype):
    with pytest.raises(ValueError, match="must be a floating-point dtype, got ") as error:
        GPT2.from_pretrained(folder, dtype=dtype)
    assert repr(dtype) in str(error.value)


@pytest.mark.parametrize(
    ("argument", "meant"), [("torch_dtype", "dtype"), ("n_layers", "n_layer"), ("attn_dropout", None), ("attn", None)]
)
def test_an_argument_that_does_not_exist_is_named(folder, argument, meant):
    with pytest.raises(ConfigError, match=f"^{argument} is neither an argument") as error:
        GPT2.from_pretrained(folder, **{argument: torch.bfloat16})
    assert meant is None or str(error.value).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_torch_leave_loading_and_saving_alone(folder, official, tmp_path, dtype, device):
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        model = GPT2.from_pretrained(folder)
        model.save_pretrained(tmp_path / "new")
        model.resize_vocabulary(505)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert same(GPT2.from_pretrained(tmp_path / "new"), official)


def test_an_untied_head_is_refused(folder, official):
    rewrite(folder, official | {"lm_head.weight": official["wte.weight"] + 1})
    assert "lm_head.weight differs from wte.weight; a head of its own is loaded with tie_word" in problems_of(folder)
    model = GPT2.from_pretrained(folder, tie_word_embeddings=False)
    assert torch.equal(model.head, official["wte.weight"] + 1)


def test_a_head_of_its_own_that_is_missing_is_named(folder):
    with pytest.raises(WeightsError, match=r"lm_head\.weight \(503, 64\) is missing"):
        GPT2.from_pretrained(folder, tie_word_embeddings=False)


def test_weights_that_are_pickled_are_refused_with_what_to_do(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = problems_of(folder)
    assert "it holds config.json, generation_config.json, " in text
    assert f"GPT2LMHeadModel.from_pretrained('{folder}').save_pretrained(" in text


def test_a_head_with_a_nan_may_be_tied(folder, official):
    official["wte.weight"][3, 3] = float("nan")
    rewrite(folder, official | {"lm_head.weight": official["wte.weight"].clone()})
    assert GPT2.from_pretrained(folder).wte.weight.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.float8_e4m3fn], ids=str)
def test_a_head_of_another_dtype_is_refused_by_name(folder, official, dtype):
    rewrite(folder, official | {"lm_head.weight": official["wte.weight"].to(dtype)})
    assert "lm_head.weight" in problems_of(folder)


def test_a_head_of_another_shape_is_refused_by_name(folder, official):
    rewrite(folder, official | {"lm_head.weight": torch.zeros(2, 2)})
    assert "lm_head.weight" in problems_of(folder)


@pytest.fixture
def sharded(hf_tiny, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        GPT2LMHeadModel.from_pretrained(hf_tiny).save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_shards_with_an_index_are_read(sharded, official):
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    assert not (sharded / "model.safetensors").exists()
    assert same(GPT2.from_pretrained(sharded), official)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"shard {shard.name} is missing" in problems_of(sharded)


@pytest.mark.parametrize("escape", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_cannot_lead_out_of_the_folder(sharded, escape):
    (sharded.parent / "outside.safetensors").write_bytes(b"")
    edit_index(sharded, lambda weight_map: weight_map.update({"transformer.wte.weight": escape}))
    assert f"{escape!r} is not a file name" in problems_of(sharded)


@pytest.mark.parametrize(
    "contents",
    [
        *["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}'],
        *["[" * 100_000, '{"weight_map": {"a": "%s"}}' % ("b" * 300), '{"weight_map": {"a": "b\\u0000"}}'],
    ],
    ids=lambda contents: contents[:40],
)
def test_a_bad_index_is_named(sharded, contents):
    (sharded / "model.safetensors.index.json").write_text(contents)
    assert "model.safetensors.index.json: " in problems_of(sharded)


def test_a_tensor_in_two_shards_is_named(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    assert f"{name.removeprefix('transformer.')} is there twice" in problems_of(sharded)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: b"",
        lambda whole: b"\0" * 8,
        lambda whole: whole[:7],
        lambda whole: whole[:100],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: b"\x80\x02}q\x00." + whole,
    ],
    ids=["empty", "zeros", "stub", "header", "half", "short", "long", "pickle"],
)
def test_a_damaged_file_is_named(folder, spoil):
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    assert problems_of(folder).startswith(f"{path}: not a whole safetensors file")


def test_a_damaged_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert problems_of(sharded).startswith(f"{shard}: not a whole safetensors file")


def test_pickled_weights_are_never_opened(folder):
    class Trap:
        def __reduce__(self):
            return os.abort, ()

    torch.save({"wte.weight": Trap()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin" in problems_of(folder)
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    assert "not a whole safetensors file" in problems_of(folder)


def test_every_tensor_at_fault_is_named_at_once(folder, official):
    del official["h.1.ln_1.bias"]
    official["h.0.mlp.c_fc.weight"] = official["h.0.mlp.c_fc.weight"].T.contiguous()
    official["wpe.weight"] = official["wpe.weight"].long()
    official["h.7.ln_1.bias"] = torch.zeros(1)
    official["odd"] = torch.zeros(1)
    rewrite(folder, official)
    text = problems_of(folder)
    assert "h.1.ln_1.bias (64,) is missing" in text
    assert "h.0.mlp.c_fc.weight has shape (256, 64), the config asks for (64, 256)" in text
    assert "wpe.weight has dtype I64" in text
    assert "h.7.ln_1.bias is unexpected" in text
    assert "odd is unexpected" in text


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("n_layer", 2, "h.2.ln_1.weight"),
        ("n_layer", 4, "h.3.ln_1.weight"),
        ("n_embd", 128, "wte.weight"),
        ("vocab_size", 500, "wte.weight"),
        ("n_positions", 65, "wpe.weight"),
        ("n_inner", 64, "h.0.mlp.c_fc.weight"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_names_them(folder, field, value, named):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert named in problems_of(folder)


def test_a_missing_config_and_a_missing_folder_are_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        GPT2.from_pretrained(folder)
    assert "gpt2-large" in problems_of(folder / "nothing")
    assert "gpt2-large" in problems_of(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saving_then_loading_returns_every_bit(tiny_config, tmp_path, dtype):
    model = GPT2(tiny_config).to(dtype)
    with torch.no_grad():
        model.ln_f.bias[:3] = torch.tensor([float("nan"), -0.0, torch.finfo(dtype).smallest_normal / 2])
    model.save_pretrained(tmp_path / "new" / "folder")
    back = GPT2.from_pretrained(tmp_path / "new" / "folder", dtype=dtype)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    assert back.config == model.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_what_we_save(tiny_model, tmp_path, dtype):
    tiny_model.to(dtype).save_pretrained(tmp_path)
    theirs, report = GPT2LMHeadModel.from_pretrained(
        tmp_path, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert {key: list(found) for key, found in report.items() if found} == {}
    assert theirs.dtype == dtype
    theirs = {name.removeprefix("transformer."): p for name, p in theirs.named_parameters()}
    assert same(tiny_model, theirs)


def test_transformers_gives_the_same_logits_for_what_we_save(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(tiny_model(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-4)


def test_training_the_loaded_model_leaves_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = GPT2.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    optimizer.step()
    assert not torch.equal(model.wte.weight, GPT2.from_pretrained(folder).wte.weight)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_model_is_saved_into_the_folder_it_came_from(folder):
    model = GPT2.from_pretrained(folder)
    with torch.no_grad():
        model.wte.weight += 1
    before = sorted(folder.iterdir())
    model.save_pretrained(folder)
    assert torch.equal(GPT2.from_pretrained(folder).wte.weight, model.wte.weight)
    assert sorted(folder.iterdir()) == before


class Adapter(nn.Module):
    """LoRA, by hand."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(torch.zeros(64, 2)), nn.Parameter(torch.zeros(2, base.weight.size(1)))

    def forward(self, x):
        return self.base(x) + x @ self.A @ self.B


class Doubled(nn.Module):
    """A wrapper without parameters, under the name that DDP gives to what it wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


class Remembering(Projection):
    def get_extra_state(self):
        return {"calls": 3}


class Sharded(torch.Tensor):
    pass


def replace(name, make):
    def change(model):
        parent, _, child = name.rpartition(".")
        old = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, make(old))

    return change


def retype(name, make):
    def change(model):
        module, _, parameter = name.rpartition(".")
        old = model.get_parameter(name).detach()
        setattr(model.get_submodule(module), parameter, nn.Parameter(make(old), requires_grad=False))

    return change


def quantized(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


CHANGES = {
    "an adapter": (replace("h.0.attn.c_attn", Adapter), "h.0.attn.c_attn.A is unexpected"),
    "pruning": (
        lambda model: prune.l1_unstructured(model.h[0].mlp.c_fc, "weight", amount=0.5),
        "h.0.mlp.c_fc.weight (64, 256) is missing (there is h.0.mlp.c_fc.weight_orig)",
    ),
    "weight norm": (
        lambda model: parametrizations.weight_norm(model.h[1].attn.c_proj),
        "h.1.attn.c_proj.parametrizations.weight.original0 is unexpected",
    ),
    "a larger embedding": (replace("wte", lambda old: nn.Embedding(510, 64)), "wte.weight has shape (510, 64)"),
    "more positions": (replace("wpe", lambda old: nn.Embedding(65, 64)), "wpe.weight has shape (65, 64)"),
    "a square Linear": (
        replace("h.2.attn.c_proj", lambda old: nn.Linear(64, 64)),
        "h.2.attn.c_proj is a Linear, not a Projection",
    ),
    "a wrapper": (replace("h.0.mlp.c_fc", Doubled), "h.0.mlp.c_fc.module.weight is unexpected"),
    "another LayerNorm": (replace("ln_f", lambda old: nn.RMSNorm(64)), "ln_f.bias (64,) is missing"),
    "no LayerNorm": (replace("h.0.ln_1", lambda old: nn.Identity()), "h.0.ln_1.weight (64,) is missing"),
    "a block less": (lambda model: model.h.pop(2), "h.2.ln_1.weight (64,) is missing"),
    "a parameter more": (
        lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(1))),
        "scale is unexpected",
    ),
    "a buffer": (lambda model: model.h[0].register_buffer("mean", torch.ones(1)), "h.0.mean is unexpected"),
    "a head of its own": (
        lambda model: model.add_module("lm_head", nn.Linear(64, 503, bias=False)),
        "lm_head.weight is unexpected",
    ),
    "a state of its own": (replace("h.0.mlp.c_fc", lambda old: Remembering(64, 256)), "_extra_state is unexpected"),
    "no memory": (lambda model: model.to("meta"), "tensor on meta"),
    "integers": (retype("wte.weight", torch.Tensor.long), "wte.weight is a torch.strided torch.int64 tensor"),
    "eight bits": (retype("wte.weight", lambda t: t.to(torch.float8_e5m2)), "torch.float8_e5m2"),
    "quantized": (retype("h.0.mlp.c_fc.weight", quantized), "torch.qint8"),
    "sparse": (retype("h.0.mlp.c_fc.weight", torch.Tensor.to_sparse), "torch.sparse_coo"),
    "a tensor of another kind": (retype("ln_f.bias", lambda t: t.as_subclass(Sharded)), "ln_f.bias is a Sharded"),
    "not yet a size": (
        lambda model: setattr(model.ln_f, "bias", nn.UninitializedParameter()),
        "ln_f.bias is a UninitializedParameter",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_model_that_could_not_be_loaded_again_is_not_saved(folder, tiny_model, change, message):
    before = contents(folder)
    change(tiny_model)
    for target in (folder, folder / "new" / "folder"):
        with pytest.raises(WeightsError, match=r"^not saved, as it could not be loaded again: ") as error:
            tiny_model.save_pretrained(target)
        assert message in str(error.value)
        assert "merge_and_unload" in str(error.value)
        assert "\n" not in str(error.value)
    assert contents(folder) == before


def pruned_for_good(model):
    prune.l1_unstructured(model.h[0].mlp.c_fc, "weight", amount=0.5)
    prune.remove(model.h[0].mlp.c_fc, "weight")


def normalised_for_good(model):
    parametrizations.weight_norm(model.h[1].attn.c_proj)
    parametrize.remove_parametrizations(model.h[1].attn.c_proj, "weight")


UNCHANGED = {
    "pruned for good": pruned_for_good,
    "normalised for good": normalised_for_good,
    "compiled": lambda model: model.compile(),
    "a block compiled": replace("h.1", torch.compile),
    "a block checkpointed": replace("h.1", checkpoint_wrapper),
    "a block tied to another": lambda model: model.h.__setitem__(1, model.h[0]),
    "parameters in one memory": lambda model: setattr(
        model.h[0].ln_1, "weight", nn.Parameter(model.h[0].ln_1.bias.detach())
    ),
    "transposed in memory": retype("h.0.attn.c_attn.weight", lambda t: t.T.contiguous().T),
    "frozen": lambda model: model.requires_grad_(False),
    "a buffer that is not kept": lambda model: model.register_buffer("mean", torch.ones(1), persistent=False),
    "a weight that is a buffer": lambda model: (
        delattr(model.ln_f, "bias"),
        model.ln_f.register_buffer("bias", torch.ones(64)),
    ),
    "parts in half precision": lambda model: model.h[0].mlp.bfloat16(),
}


@pytest.mark.parametrize("change", UNCHANGED.values(), ids=UNCHANGED)
def test_what_is_saved_can_be_loaded(tiny_model, tmp_path, change):
    change(tiny_model)
    tiny_model.save_pretrained(tmp_path)
    back = GPT2.from_pretrained(tmp_path)
    names = {name.replace("_orig_mod.", ""): p for name, p in tiny_model.state_dict().items()}
    assert same(back, {name: p.float() for name, p in names.items()})
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_adapters_of_peft_are_merged_then_saved(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import Linear

    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    config._register_custom_module({Projection: Linear})
    adapted = peft.get_peft_model(tiny_model, config).eval()
    with pytest.raises(WeightsError, match=r"h\.0\.attn\.c_attn\.base_layer\.weight.*merge_and_unload"):
        tiny_model.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = adapted(IDS)
        adapted.merge_and_unload().save_pretrained(tmp_path)
        torch.testing.assert_close(GPT2.from_pretrained(tmp_path)(IDS), logits, rtol=1e-4, atol=1e-4)


def test_a_vocabulary_grows(tiny_model, tmp_path):
    old = tiny_model.wte.weight.detach().clone()
    with torch.no_grad():
        before = tiny_model(IDS)
    tiny_model.resize_vocabulary(510)
    with torch.no_grad():
        after = tiny_model(IDS)
    torch.testing.assert_close(after[..., :503], before)
    torch.testing.assert_close(after[..., 503:], before.mean(-1, keepdim=True).expand(-1, -1, 7))
    assert torch.equal(tiny_model.wte.weight[:503], old)
    assert tiny_model.config.vocab_size == tiny_model.wte.num_embeddings == 510

    tiny_model.train().loss(torch.tensor([[509, 3]]), torch.tensor([[1, 505]])).backward()
    assert tiny_model.wte.weight.grad[505].any()
    tiny_model.save_pretrained(tmp_path)
    assert same(GPT2.from_pretrained(tmp_path), dict(tiny_model.named_parameters()))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, after, rtol=1e-5, atol=1e-4)


def test_a_vocabulary_with_a_head_of_its_own_grows(tiny_config, tmp_path):
    model = GPT2(tiny_config.replace(tie_word_embeddings=False)).eval()
    with torch.no_grad():
        before = model(IDS)
        model.resize_vocabulary(510)
        torch.testing.assert_close(model(IDS)[..., :503], before)
        torch.testing.assert_close(model(IDS)[..., 503:], before.mean(-1, keepdim=True).expand(-1, -1, 7))
    model.save_pretrained(tmp_path)
    assert same(GPT2.from_pretrained(tmp_path), dict(model.named_parameters()))
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path)(IDS).logits, model(IDS), rtol=1e-5, atol=1e-4)


def test_a_vocabulary_shrinks_and_an_embedding_resized_by_hand_is_kept(tiny_model):
    old = tiny_model.wte.weight.detach().clone()
    tiny_model.requires_grad_(False).bfloat16().resize_vocabulary(500)
    assert torch.equal(tiny_model.wte.weight, old[:500].bfloat16())
    assert not tiny_model.wte.weight.requires_grad
    tiny_model.wte = nn.Embedding(600, 64)
    by_hand = tiny_model.wte.weight.detach().clone()
    tiny_model.resize_vocabulary(600)
    assert torch.equal(tiny_model.wte.weight, by_hand)
    assert tiny_model.config.vocab_size == 600


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "510", 10**12])
def test_an_impossible_vocabulary_is_refused_by_name(tiny_model, n):
    with pytest.raises(ConfigError, match="vocab_size must be an integer from 1 to "):
        tiny_model.resize_vocabulary(n)
    assert (tiny_model.config.vocab_size, len(tiny_model.wte.weight)) == (503, 503)


def test_saved_files_have_the_usual_permissions(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "usual").write_text("")
    assert {p.stat().st_mode for p in tmp_path.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_a_save_that_fails_leaves_the_old_files_and_nothing_else(folder, monkeypatch):
    model = GPT2.from_pretrained(folder)
    before = contents(folder)

    def full_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"\0" * 1000)
        raise OSError("No space left on device")

    monkeypatch.setattr("minigpt2.weights.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert contents(folder) == before


def test_an_error_of_the_file_system_names_the_file(folder, monkeypatch):
    def full_disk(tensors, path, metadata=None):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("minigpt2.weights.save_file", full_disk)
    with pytest.raises(OSError, match=rf"No space left on device.*{folder}/model\.safetensors"):
        GPT2.from_pretrained(folder).save_pretrained(folder)


@pytest.mark.parametrize("call", [1, 2])
def test_a_disk_that_fails_late_leaves_both_old_files(folder, monkeypatch, call):
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.EIO, "Input/output error")

    model = GPT2.from_pretrained(folder)
    model.resize_vocabulary(505)
    before = contents(folder)
    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        model.save_pretrained(folder)
    assert contents(folder) == before


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
import torch
from minigpt2 import GPT2, weights

def killed(tensors, path, metadata=None):
    Path(path).write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)

model = GPT2.from_pretrained(sys.argv[1])
torch.nn.init.zeros_(model.wte.weight)
weights.save_file = killed
model.save_pretrained(sys.argv[1])
"""


def test_a_save_that_is_killed_leaves_the_old_files_whole(folder):
    before = contents(folder)
    killed = subprocess.run([sys.executable, "-c", KILLED_SAVE, folder])
    assert killed.returncode == -signal.SIGKILL
    assert {name: bytes_ for name, bytes_ in contents(folder).items() if name in before} == before
    GPT2.from_pretrained(folder).save_pretrained(folder)


def test_no_unpickling_happens(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.save", "pickle.dump"):
        monkeypatch.setattr(name, refuse)
    GPT2.from_pretrained(folder).save_pretrained(folder)


PEAK = """
import re, sys
from pathlib import Path
import torch

def peak():  # of this process alone: getrusage would count what its parent held
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
import minigpt2
model = minigpt2.GPT2.from_pretrained(sys.argv[1])
total = sum(float(p.detach().sum()) for p in model.parameters())  # touches every page
print(before, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_124m_does_not_hold_two_copies(hf_124m):
    result = subprocess.run([sys.executable, "-c", PEAK, hf_124m], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    size = (hf_124m / "model.safetensors").stat().st_size
    assert size > 497e6
    assert 0.95 * size < after - before <= 1.15 * size
