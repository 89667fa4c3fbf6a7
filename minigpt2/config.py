"""The shape of a GPT-2, with the field names of the official config.json."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ACTIVATIONS", "OFFICIAL_SIZES", "ConfigError", "GPT2Config"]


class ConfigError(ValueError):
    """A configuration that does not describe a GPT-2 this package implements. Lists every problem found."""


# The four published sizes (Radford et al. 2019, table 2, with the heads of the released checkpoints).
OFFICIAL_SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

# Other names of a field, as transformers' attribute_map has them; and that of the first GPT-2 files.
_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "n_ctx": "n_positions",
}

# Keys of a config.json that change the mathematics, with the settings that are implemented. transformers'
# PretrainedConfig and GPT2Config define them.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),  # a causal model either way; only cross-attention would differ
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}, []),
    "quantization_config": (None,),
}

# Keys that leave the mathematics of the language model alone: what a loader, a trainer, a sampler or another head
# reads, in any release of transformers. reorder_and_upcast_attn is one of them: it orders half-precision arithmetic and
# is the same function in float32. So is every key that begins with an underscore, a note of the library to itself.
_HARMLESS = {
    "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward", "custom_pipelines", "dtype",
    "finetuning_task", "gradient_checkpointing", "id2label", "label2id", "line_by_line", "model_parallel", "n_special",
    "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "output_past", "prefix",
    "predict_special_tokens", "problem_type", "reorder_and_upcast_attn", "return_dict", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
    "use_bfloat16", "use_cache", "xla_device",
    # Token ids.
    "additional_special_tokens_ids", "bos_token_ids", "cls_token_id", "decoder_start_token_id", "eos_token_ids",
    "mask_token_id", "pad_token_id", "pad_token_ids", "sep_token_id", "unk_token_id",
    # Generation, which has a file of its own today.
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip

# The sizes, and how large each may be: a damaged file is refused before memory is asked for.
_SIZES = {
    "vocab_size": 10**8,
    "n_positions": 10**8,
    "n_embd": 10**7,
    "n_layer": 10**4,
    "n_head": 10**7,
    "n_inner": 10**8,
}

# The first five are names of the same tanh approximation of GELU, the next two of GELU itself; silu is swish.
ACTIVATIONS = (
    *("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    *("gelu", "gelu_python", "relu", "silu", "swish", "tanh"),
)


@dataclass(frozen=True)
class GPT2Config:
    """Hyperparameters of a GPT-2. The defaults are those of the 124M model, `gpt2`.

    Raises `ConfigError` (a ValueError) that lists every problem at once.
    """

    vocab_size: int = 50257
    """Number of token ids."""
    n_positions: int = 1024
    """The context length: the most tokens one sequence may have."""
    n_embd: int = 768
    """Width of the residual stream (C in the shape comments)."""
    n_layer: int = 12
    """Number of blocks (L)."""
    n_head: int = 12
    """Attention heads (H) of a block; divides n_embd."""
    n_inner: int | None = None
    """Width inside the MLP; None means 4 * n_embd."""
    activation_function: str = "gelu_new"
    """Between the two projections of an MLP: one of ACTIVATIONS. GPT-2's is the tanh approximation of GELU."""
    resid_pdrop: float = 0.1
    """Dropout on what attention and MLP add to the residual stream."""
    embd_pdrop: float = 0.1
    """Dropout on the sum of token and position embeddings."""
    attn_pdrop: float = 0.1
    """Dropout on the attention probabilities."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    scale_attn_weights: bool = True
    """Divide the scores of attention by sqrt(head_dim)."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Divide them by the number of the block too, counted from 1."""
    tie_word_embeddings: bool = True
    """The output head is the token embedding; otherwise a parameter of its own, `lm_head.weight`."""
    bos_token_id: int | None = 50256
    """Id that opens a text: <|endoftext|>."""
    eos_token_id: int | tuple[int, ...] | None = 50256
    """Id that closes a text: <|endoftext|>; or several, any of which does."""

    def __post_init__(self) -> None:
        problems = []
        for name, most in _SIZES.items():
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if not _is_int(value) or not 1 <= value <= most:
                problems.append(f"{name} must be an integer from 1 to {most}, got {value!r}")
        if not problems and self.n_embd % self.n_head:
            problems.append(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd}, n_head={self.n_head}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                problems.append(f"{name} must be a number in [0, 1), got {value!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < float("inf"):
                problems.append(f"{name} must be a positive number, got {value!r}")
        if self.activation_function not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            problems.append(f"activation_function must be one of {names}, got {self.activation_function!r}")
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name} must be true or false, got {getattr(self, name)!r}")
        if isinstance(self.eos_token_id, list):  # as JSON has it
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, tuple) and value and name == "eos_token_id" else (value,)
            if value is not None and not all(map(_is_int, ids)):
                problems.append(f"{name} must be a token id or null, got {value!r}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Width of one head (D)."""
        return self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def attention_scale(self, block: int) -> float:
        """What the scores of attention are multiplied by in a block, counted from 0."""
        scale = 1 / math.sqrt(self.head_dim) if self.scale_attn_weights else 1.0
        return scale / (block + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that close a text, of which there may be none."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    @classmethod
    def official(cls, name: str, **overrides: Any) -> GPT2Config:
        """The configuration of `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`."""
        if name not in OFFICIAL_SIZES:
            raise ConfigError(f"no official size is called {name!r}; there are {', '.join(OFFICIAL_SIZES)}")
        return cls().replace(**OFFICIAL_SIZES[name]).replace(**overrides)

    def replace(self, **overrides: Any) -> GPT2Config:
        """A copy with some fields changed; an unknown field raises ConfigError."""
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise ConfigError(f"GPT2Config has no field {', '.join(unknown)}")
        return dataclasses.replace(self, **overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> GPT2Config:
        """Read the contents of a config.json of transformers.

        A key that changes the mathematics and is not implemented raises ConfigError by name; a key this package has
        never heard of is named in one warning.
        """
        problems = [
            f"{key}={values[key]!r} is not implemented (only {' or '.join(map(repr, allowed))})"
            for key, allowed in _ONLY.items()
            if key in values and values[key] not in allowed
        ]
        fields = {field.name for field in dataclasses.fields(cls)}
        found = {key: value for key, value in values.items() if key in fields}
        for alias, name in _ALIASES.items():
            if alias in values and found.setdefault(name, values[alias]) != values[alias] and alias != "n_ctx":
                problems.append(f"{alias}={values[alias]!r} contradicts {name}={found[name]!r}")
        config = None
        try:
            config = cls(**found).replace(**overrides)
        except ConfigError as error:
            problems.append(str(error))
        if problems or config is None:
            raise ConfigError("; ".join(problems))
        unknown = sorted(set(values) - fields - set(_ONLY) - set(_ALIASES) - _HARMLESS)
        unknown = [key for key in unknown if not key.startswith("_")]
        if unknown:
            warnings.warn(f"config keys unknown to minigpt2 were ignored: {', '.join(unknown)}", stacklevel=2)
        return config

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> GPT2Config:
        """Read a config.json; every problem is reported with the file's name."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
        try:
            return cls.from_dict(values, **overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields, with what transformers needs to recognise the model."""
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **dataclasses.asdict(self)}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
