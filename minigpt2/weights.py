"""Weights in and out: safetensors with the official names, and where the official files come from.

The parameters of `GPT2` have the names, shapes and layout of the official checkpoint, so loading is a lookup: each
tensor of the file is mapped into memory and becomes the parameter, without a copy unless the dtype changes. The
mapping is private: training the model does not change the file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigpt2.config import GPT2Config
from minigpt2.files import atomic_write, sha256_of
from minigpt2.model import GPT2

__all__ = ["OFFICIAL", "WeightsError", "download", "from_pretrained", "parameter_shapes", "save_pretrained"]


class WeightsError(ValueError):
    """Weights that are absent, damaged, or do not fit the configuration. Names the file and every tensor at fault."""


@dataclass(frozen=True)
class OfficialFile:
    """A published model.safetensors, pinned to a commit of its repository on the Hugging Face hub."""

    repository: str
    revision: str
    size: int | None = None
    """Bytes, where known."""
    sha256: str | None = None
    """Digest of the file, where known; without it the pinned commit is all that vouches for the contents."""


OFFICIAL = {
    "gpt2": OfficialFile(
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        548_105_171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": OfficialFile("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": OfficialFile("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": OfficialFile(
        "openai-community/gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}

WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"

# The published files hold the causal mask as a buffer in every block.
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The official name and shape of every parameter; projections are (in, out)."""
    C, inner = config.n_embd, config.inner
    norm: dict[str, tuple[int, ...]] = {"weight": (C,), "bias": (C,)}

    def projection(n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (n_in, n_out), "bias": (n_out,)}

    block = {
        "ln_1": norm,
        "attn.c_attn": projection(C, 3 * C),
        "attn.c_proj": projection(C, C),
        "ln_2": norm,
        "mlp.c_fc": projection(C, inner),
        "mlp.c_proj": projection(inner, C),
    }
    modules: dict[str, dict[str, tuple[int, ...]]] = {
        "wte": {"weight": (config.vocab_size, C)},
        "wpe": {"weight": (config.n_positions, C)},
    }
    modules |= {f"h.{i}.{name}": shapes for i in range(config.n_layer) for name, shapes in block.items()}
    modules["ln_f"] = norm
    return {f"{module}.{name}": shape for module, shapes in modules.items() for name, shape in shapes.items()}


def from_pretrained(
    name_or_path: str | Path,
    *,
    checkpoint_every: int = 0,
    recompute: str = "block",
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> GPT2:
    """Load a model, in evaluation mode, with its parameters converted to `dtype` (a floating-point dtype).

    `name_or_path` is an official name (`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`), looked for in `weights/NAME`
    and else fetched into the shared cache of huggingface_hub, or a folder that holds config.json and model.safetensors,
    whole or in shards with an index. `config_overrides` replace fields of config.json, such as `attn_pdrop=0.0`.

    Raises WeightsError or ConfigError (ValueErrors) with everything that does not fit.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    folder = find_folder(name_or_path)
    config = GPT2Config.from_file(folder / CONFIG_FILE, **config_overrides)
    with torch.device("meta"):  # shapes only: the file brings the memory
        model = GPT2(config, checkpoint_every=checkpoint_every, recompute=recompute, attention=attention)
    tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(folder, config)}
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_().eval()


def save_pretrained(model: GPT2, folder: str | Path) -> None:
    """Write `folder`/model.safetensors and config.json, in the model's dtype; transformers loads them as they are.

    Each file is written beside its final name and renamed: an interrupted save leaves the old one whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"transformer.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    config = model.config.to_dict() | {"dtype": str(model.wte.weight.dtype).removeprefix("torch.")}
    with atomic_write(folder / CONFIG_FILE) as config_file, atomic_write(folder / WEIGHTS_FILE) as file:
        save_file(tensors, file, metadata={"format": "pt"})
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_tensors(folder: Path, config: GPT2Config) -> Iterator[tuple[str, Tensor]]:
    """Yield (official name, tensor) for every parameter of `config`, once all of them are known to be there, with the
    right shapes and floating-point dtypes. The tensors are views of the mapped files."""
    with ExitStack() as opened:
        found: dict[str, tuple[Any, str]] = {}  # official name -> (open file, name in the file)
        problems: list[str] = []
        for path in weight_files(folder):
            try:
                file = opened.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path}: not a whole safetensors file: {error}") from None
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name = key.removeprefix("transformer.")
                if _MASK_BUFFER.fullmatch(name):
                    continue
                if name in found:
                    problems.append(f"{name} is there twice, as {found[name][1]!r} and {key!r}")
                found[name] = (file, key)

        shapes = parameter_shapes(config)
        if "lm_head.weight" in found:
            file, key = found["lm_head.weight"]
            tied = found.setdefault("wte.weight", (file, key))
            del found["lm_head.weight"]
            if tied != (file, key) and not _equal(file, key, *tied):
                problems.append("lm_head.weight differs from wte.weight: an untied head is not implemented")
        for name, shape in shapes.items():
            if name not in found:
                problems.append(f"{name} {shape} is missing")
                continue
            file, key = found[name]
            piece = file.get_slice(key)
            if tuple(piece.get_shape()) != shape:
                problems.append(f"{name} has shape {tuple(piece.get_shape())}, the config asks for {shape}")
            if piece.get_dtype() not in _DTYPES:
                problems.append(f"{name} has dtype {piece.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        problems += [f"{found[name][1]} is unexpected" for name in sorted(set(found) - set(shapes))]
        if problems:
            raise WeightsError(f"{folder}: {_listed(problems)}")
        for name in shapes:
            file, key = found[name]
            yield name, file.get_tensor(key)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or the shards that the index names."""
    whole, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if whole.is_file():
        return [whole]
    if not index.is_file():
        present = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise WeightsError(
            f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} (pickle files are not read); it holds {present}"
        )
    try:
        shards = sorted(map(Path, set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: not an index of safetensors shards: {error!r}") from None
    problems = [f"{str(path)!r} is not a file name" for path in shards if path.name in ("", "..") or path.parent.parts]
    problems += [f"shard {path} is missing" for path in shards if not (folder / path).is_file()]
    if problems:
        raise WeightsError(f"{index}: {_listed(problems)}")
    return [folder / path for path in shards]


def find_folder(name_or_path: str | Path) -> Path:
    """The folder of an official name or a path, fetching an official one that is not here."""
    if name_or_path in OFFICIAL:
        name = str(name_or_path)
        folder = weights_root() / name
        return folder if folder.is_dir() else _fetch(name)
    folder = Path(name_or_path)
    if not folder.is_dir():
        raise WeightsError(
            f"{str(name_or_path)!r} is neither an official name ({', '.join(OFFICIAL)}) nor a folder with weights"
        )
    return folder


def weights_root() -> Path:
    """`weights/` of the checkout this package lies in, or of the current folder when it is installed elsewhere."""
    checkout = Path(__file__).resolve().parent.parent / "weights"
    return checkout if checkout.is_dir() else Path("weights")


def download(name: str) -> Path:
    """Fetch an official size into `weights/NAME` and check it. Returns the folder; one that is there is checked again.

    The folder appears only when its contents are verified; an interrupted download is repeated by calling this again.
    """
    if name not in OFFICIAL:
        raise WeightsError(f"no official weights are called {name!r}; there are {', '.join(OFFICIAL)}")
    folder = weights_root() / name
    if folder.exists():
        try:
            verify(folder / WEIGHTS_FILE, OFFICIAL[name])
        except WeightsError as error:
            raise WeightsError(f"{error}; delete {folder} and download again") from None
        return folder
    partial = folder.with_name(f".{name}.part")
    _fetch(name, partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # huggingface_hub's notes, and what interruptions left
    partial.replace(folder)
    return folder


def _fetch(name: str, folder: Path | None = None) -> Path:
    """Fetch config and weights with huggingface_hub, into `folder` or else its shared cache; return their folder."""
    from huggingface_hub import hf_hub_download

    official = OFFICIAL[name]
    try:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            path = Path(hf_hub_download(official.repository, file, revision=official.revision, local_dir=folder))
    except Exception as error:  # the hub's own, its HTTP client's and the system's: all of them mean "not fetched"
        raise WeightsError(
            f"{name}: could not be fetched from {official.repository} at {official.revision[:8]}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    try:
        verify(path, official)
    except WeightsError as error:
        # Or the hub's client would take it for fetched the next time. In its cache, path is a link.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise WeightsError(f"{error}; what was fetched is deleted") from None
    return path.parent


def verify(path: Path, official: OfficialFile) -> None:
    """Raise WeightsError unless the file has the size and digest that are known of it."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if official.size is not None and path.stat().st_size != official.size:
        raise WeightsError(f"{path}: {path.stat().st_size} bytes, expected {official.size}")
    if official.sha256 is not None and (digest := sha256_of(path)) != official.sha256:
        raise WeightsError(f"{path}: sha256 is {digest}, expected {official.sha256}")


def _equal(file: Any, key: str, other_file: Any, other_key: str) -> bool:
    """Whether two tensors of opened files have the same dtype, shape and values."""
    a, b = file.get_slice(key), other_file.get_slice(other_key)
    if (a.get_dtype(), a.get_shape()) != (b.get_dtype(), b.get_shape()):
        return False
    return torch.equal(file.get_tensor(key), other_file.get_tensor(other_key))


def _listed(problems: list[str], most: int = 12) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
