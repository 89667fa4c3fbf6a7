"""The shape of a GPT-2, with the field names of the official config.json."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["OFFICIAL_SIZES", "ConfigError", "GPT2Config"]


class ConfigError(ValueError):
    """A configuration that does not describe a GPT-2 this package implements. Lists every problem found."""


# The four published sizes (Radford et al. 2019, table 2, with the heads of the released checkpoints).
OFFICIAL_SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

# Keys of an official config.json that change the mathematics, with the one setting each that is implemented.
# transformers' PretrainedConfig and GPT2Config define them.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),  # a causal model either way; only cross-attention would differ
    "cross_attention_hidden_size": (None,),
    "tie_word_embeddings": (True,),
    "pruned_heads": (None, {}, []),
    "quantization_config": (None,),
}

# Keys that leave the mathematics of the language model alone: what a loader, a sampler or another head reads.
# reorder_and_upcast_attn is one of them: it orders half-precision arithmetic and is the same function in float32.
_HARMLESS = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "n_ctx", "use_cache", "reorder_and_upcast_attn",
    "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "task_specific_params", "pad_token_id", "sep_token_id", "id2label", "label2id", "num_labels", "problem_type",
    "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate", "gradient_checkpointing",
    "chunk_size_feed_forward", "name_or_path", "_name_or_path", "_commit_hash", "finetuning_task",
    "predict_special_tokens",
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

# Two names of the same tanh approximation of GELU.
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")


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
    """GPT-2's tanh approximation of GELU is the only one."""
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
    bos_token_id: int | None = 50256
    """Id that opens a text: <|endoftext|>."""
    eos_token_id: int | None = 50256
    """Id that closes a text: <|endoftext|>."""

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
        if self.activation_function not in _GELU_TANH:
            problems.append(f"activation_function must be one of {_GELU_TANH}, got {self.activation_function!r}")
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
        """Read the contents of an official config.json.

        A key that changes the mathematics and is not implemented raises ConfigError by name; a key this package has
        never heard of is named in one warning.
        """
        problems = [
            f"{key}={values[key]!r} is not implemented (only {' or '.join(map(repr, allowed))})"
            for key, allowed in _ONLY.items()
            if key in values and values[key] not in allowed
        ]
        fields = {field.name for field in dataclasses.fields(cls)}
        config = None
        try:
            config = cls(**{key: value for key, value in values.items() if key in fields}).replace(**overrides)
        except ConfigError as error:
            problems.append(str(error))
        if problems or config is None:
            raise ConfigError("; ".join(problems))
        unknown = sorted(set(values) - fields - set(_ONLY) - _HARMLESS)
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
