"""config.json in: what is read, what is refused by name, what is named in a warning."""

import dataclasses
import json
import warnings

import pytest
from transformers import GPT2Config as HFConfig

from minigpt2 import ConfigError, GPT2Config
from minigpt2.config import ACTIVATIONS
from minigpt2.ops.activations import activation

# The published config.json of gpt2 (2019), and the keys that other published GPT-2 files of its time carry.
PUBLISHED = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
    "finetuning_task": None,
    "is_decoder": False,
    "num_labels": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "predict_special_tokens": True,
    "pruned_heads": {},
    "_num_labels": 1,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "output_past": True,
    "torchscript": False,
    "use_bfloat16": False,
    "xla_device": None,
    "do_sample": False,
    "eos_token_ids": 0,
    "max_length": 20,
    "num_beams": 1,
    "pad_token_id": 0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "_attn_implementation_autoset": True,
}

UNIMPLEMENTED = [
    ("model_type", "gptj"),
    ("add_cross_attention", True),
    ("is_encoder_decoder", True),
    ("cross_attention_hidden_size", 64),
    ("pruned_heads", {"0": [1]}),
    ("quantization_config", {"bits": 4}),
    ("activation_function", "quick_gelu"),
]


def test_the_defaults_are_gpt2():
    assert GPT2Config() == GPT2Config.official("gpt2")


@pytest.mark.parametrize(
    ("name", "n_layer", "n_head", "n_embd"),
    [("gpt2", 12, 12, 768), ("gpt2-medium", 24, 16, 1024), ("gpt2-large", 36, 20, 1280), ("gpt2-xl", 48, 25, 1600)],
)
def test_official_sizes(name, n_layer, n_head, n_embd):
    config = GPT2Config.official(name)
    assert (config.n_layer, config.n_head, config.n_embd) == (n_layer, n_head, n_embd)
    assert (config.vocab_size, config.n_positions, config.head_dim, config.inner) == (50257, 1024, 64, 4 * n_embd)


def test_official_takes_overrides_and_refuses_other_names():
    assert GPT2Config.official("gpt2-xl", n_positions=8).n_positions == 8
    with pytest.raises(ConfigError, match=r"gpt3.*gpt2-medium"):
        GPT2Config.official("gpt3")


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPT2Config().n_layer = 3


@pytest.mark.parametrize(("key", "value"), UNIMPLEMENTED)
def test_an_option_that_changes_the_mathematics_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        GPT2Config.from_dict(PUBLISHED | {key: value})


def test_all_problems_are_reported_at_once():
    options = {"is_encoder_decoder": True, "add_cross_attention": True}
    fields = {"n_embd": 0, "n_head": "12", "resid_pdrop": 1.0, "layer_norm_epsilon": 0, "activation_function": "mish"}
    with pytest.raises(ConfigError) as error:
        GPT2Config.from_dict(options | fields)
    assert [key for key in options | fields if key not in str(error.value)] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, bad) for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head") for bad in (0, -1)],
        ("n_layer", 1.0),
        ("n_layer", True),
        ("n_head", 5),
        ("n_inner", 0),
        *[(field, bad) for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop") for bad in (-0.1, 1.0, "0.1")],
        *[(field, bad) for field in ("layer_norm_epsilon", "initializer_range") for bad in (0, float("nan"), "1e-5")],
        ("layer_norm_epsilon", float("inf")),
        *[(field, 10**19) for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")],
        ("n_layer", 10**9),
        *[(f, bad) for f in ("scale_attn_weights", "tie_word_embeddings") for bad in (None, 1, "false")],
        *[("eos_token_id", bad) for bad in ("50256", [], [1, "2"], 1.0, True)],
        *[("bos_token_id", bad) for bad in ("50256", [1])],
    ],
)
def test_a_field_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        GPT2Config(**{field: value})


def test_an_unknown_field_is_refused():
    with pytest.raises(ConfigError, match="n_heads"):
        GPT2Config().replace(n_heads=4)


def test_an_inner_width_other_than_four_times_is_kept():
    assert GPT2Config(n_inner=100).inner == 100


def test_there_is_a_function_for_every_activation():
    assert all(callable(activation(name)) for name in ACTIVATIONS)


@pytest.mark.parametrize("key", ["n_ctx", "max_position_embeddings"])
def test_the_context_length_by_another_name(key):
    others = {name: value for name, value in PUBLISHED.items() if name not in ("n_positions", "n_ctx")}
    assert GPT2Config.from_dict(others | {key: 64}).n_positions == 64
    assert GPT2Config.from_dict(others | {"n_ctx": 32, "n_positions": 64}).n_positions == 64


def test_fields_by_the_names_that_all_models_of_transformers_have():
    names = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64}
    theirs = HFConfig(**names)
    assert GPT2Config.from_dict(names) == GPT2Config(n_embd=96, n_layer=2, n_head=3, n_positions=64)
    assert (theirs.n_embd, theirs.n_layer, theirs.n_head, theirs.n_positions) == (96, 2, 3, 64)
    with pytest.raises(ConfigError, match="hidden_size=96 contradicts n_embd=64"):
        GPT2Config.from_dict({"hidden_size": 96, "n_embd": 64})


def test_fields_that_are_left_out_have_the_defaults_of_transformers():
    theirs = HFConfig()
    assert {f: getattr(theirs, f) for f in dataclasses.asdict(GPT2Config())} == dataclasses.asdict(GPT2Config())
    assert GPT2Config.from_dict({"n_layer": 3}) == GPT2Config(n_layer=3)


def test_several_end_of_text_ids_survive_the_file(tmp_path):
    config = GPT2Config.from_dict({"eos_token_id": [50256, 11]})
    assert config.eos_token_ids == config.eos_token_id == (50256, 11)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert GPT2Config.from_file(tmp_path / "config.json") == config
    assert HFConfig.from_pretrained(tmp_path).eos_token_id == [50256, 11]
    assert hash(config) == hash(config.replace())
    assert (GPT2Config().eos_token_ids, GPT2Config(eos_token_id=None).eos_token_ids) == ((50256,), ())


def test_an_unknown_key_is_named_in_one_warning():
    with pytest.warns(UserWarning, match="bar, foo") as caught:
        GPT2Config.from_dict(PUBLISHED | {"foo": 1, "bar": 2})
    assert len(caught) == 1


def test_the_published_file_is_read_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GPT2Config.from_dict(PUBLISHED) == GPT2Config()


def test_what_transformers_saves_is_read_without_a_warning(tmp_path):
    HFConfig(n_embd=96, n_inner=100, n_layer=2, attn_pdrop=0.0).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = GPT2Config.from_file(tmp_path / "config.json")
    assert config == GPT2Config(n_embd=96, n_inner=100, n_layer=2, attn_pdrop=0.0)


def test_transformers_reads_what_we_write(tmp_path):
    config = GPT2Config(n_embd=96, n_layer=2, embd_pdrop=0.25)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = HFConfig.from_pretrained(tmp_path)
    assert {field: getattr(theirs, field) for field in dataclasses.asdict(config)} == dataclasses.asdict(config)
    assert GPT2Config.from_file(tmp_path / "config.json") == config


def test_overrides_replace_fields_of_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED))
    assert GPT2Config.from_file(path, attn_pdrop=0.0) == GPT2Config(attn_pdrop=0.0)
    with pytest.raises(ConfigError, match="n_heads"):
        GPT2Config.from_file(path, n_heads=4)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[1]", "JSON object, found list"),
        (b"[" * 100_000, "JSON"),
        (b'{"n_layer": 0}', "n_layer"),
        (b'{"add_cross_attention": true}', "add_cross_attention"),
    ],
)
def test_a_bad_file_is_named(tmp_path, contents, message):
    path = tmp_path / "config.json"
    path.write_bytes(contents)
    with pytest.raises(ConfigError, match=message) as error:
        GPT2Config.from_file(path)
    assert str(error.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        GPT2Config.from_file(tmp_path / "config.json")
