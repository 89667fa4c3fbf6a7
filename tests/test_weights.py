"""Weights in and out: what is read, what is refused and how it is named, and that nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from minigpt2 import GPT2, ConfigError, WeightsError
from minigpt2.weights import parameter_shapes

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


def problems_of(folder):
    with pytest.raises(WeightsError) as error:
        GPT2.from_pretrained(folder)
    return str(error.value)


def test_the_shapes_are_those_of_the_model(tiny_config):
    with torch.device("meta"):
        model = GPT2(tiny_config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(tiny_config)


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


def test_an_integer_dtype_cannot_be_asked_for(folder):
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int8"):
        GPT2.from_pretrained(folder, dtype=torch.int8)


def test_an_untied_head_is_refused(folder, official):
    rewrite(folder, official | {"lm_head.weight": official["wte.weight"] + 1})
    assert "lm_head.weight differs from wte.weight" in problems_of(folder)


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
    "contents", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}']
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
    model.save_pretrained(folder)
    assert torch.equal(GPT2.from_pretrained(folder).wte.weight, model.wte.weight)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_saved_files_have_the_usual_permissions(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "usual").write_text("")
    assert {p.stat().st_mode for p in tmp_path.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


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
