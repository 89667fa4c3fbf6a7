"""Weights in and out: safetensors with the official names, and where they come from.

The parameters of `GPT2` have the names, shapes and layout of the official checkpoint, so loading is a lookup: each
tensor of the file is mapped into memory and becomes the parameter, without a copy unless the dtype changes. The
mapping is private: training the model does not change the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minigpt2.config import ConfigError, GPT2Config
from minigpt2.files import atomic_write, flush
from minigpt2.hub import (
    CONFIG_FILE,
    INDEX_FILE,
    OFFICIAL,
    WEIGHTS_FILE,
    NotFetched,
    OfficialFile,
    WeightsError,
    fetch,
    how_to_convert,
    shard_names,
    shown,
    source_of,
    verify,
)
from minigpt2.model import GPT2
from minigpt2.run_folder import SNAPSHOT_WEIGHTS, weights_of

if TYPE_CHECKING:
    from minigpt2.tokenizer import Tokenizer

__all__ = ["OFFICIAL", "WeightsError", "download", "from_pretrained", "resize_vocabulary", "save_pretrained"]


GENERATION_FILE = "generation_config.json"

# The published files hold the causal mask as a buffer in every block.
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

# What wrappers add to the names of what they wrap: torch.compile, FSDP and activation checkpointing anywhere in a name;
# transformers, DDP and Lightning in front of it.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = re.compile(r"^(?:(?:module|model|transformer)\.)+")

HEAD = "lm_head.weight"
"""The output head, where it is not the embedding."""

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

_HOW_TO_SAVE = (
    "Undo first what changed the model: peft's merge_and_unload() merges adapters; torch.nn.utils has prune.remove, "
    "parametrize.remove_parametrizations and remove_weight_norm; model.resize_vocabulary(n) makes the configuration "
    "fit an embedding of n rows, and model.config = model.config.replace(...) other sizes"
)


def from_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    checkpoint_every: int = 0,
    recompute: str = "block",
    attention: str = "auto",
    dtype: torch.dtype | str = torch.float32,
    **config_overrides: Any,
) -> GPT2:
    """Load a model, on the CPU and in evaluation mode, with its parameters converted to `dtype`: float16, bfloat16,
    float32 or float64, as a torch.dtype or by name.

    `name_or_path` is a folder that holds config.json and model.safetensors, whole or in shards with an index; the
    folder of a run of train.py, finished or not, or of one of its snapshots (see run_folder.weights_of); or a model of
    the Hugging Face hub: `OWNER/NAME`, or an official name (`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`), whose
    commit is pinned. It is looked for in `weights/NAME` and else fetched into the shared cache of huggingface_hub.
    `revision`, or `OWNER/NAME@REVISION`, is a commit, branch or tag of it. Tensors may have the prefixes of
    transformers, DDP, FSDP, torch.compile and Lightning. `config_overrides` replace fields of config.json, such as
    `attn_pdrop=0.0`.

    Raises WeightsError or ConfigError (ValueErrors) with everything that does not fit.
    """
    wanted = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if wanted not in _DTYPES.values():
        raise ValueError(
            f"dtype must be a floating-point dtype, got {dtype!r}; there are float16, bfloat16, float32 and float64"
        )
    fields = [field.name for field in dataclasses.fields(GPT2Config)]
    for name in config_overrides.keys() - set(fields):
        close = difflib.get_close_matches(
            name, ["dtype", "revision", "checkpoint_every", "recompute", "attention", *fields], 1
        )
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{name} is neither an argument of from_pretrained nor a field of GPT2Config{hint}")
    folder = find_folder(name_or_path, revision)
    config = GPT2Config.from_file(folder / CONFIG_FILE, **config_overrides)
    with torch.device("meta"):  # shapes only: the file brings the memory
        model = GPT2(config, checkpoint_every=checkpoint_every, recompute=recompute, attention=attention)
    tensors = {name: tensor.to(wanted) for name, tensor in read_tensors(folder, _shapes(model))}
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_().eval()


def _shapes(model: GPT2) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def save_pretrained(model: GPT2, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write `folder`/model.safetensors and config.json, in the model's dtype, generation_config.json, unless there is
    one, and the files of the tokenizer, if one is given; transformers loads them as they are.

    What is written can be loaded again. Raises WeightsError, before anything is written, for a model that has other
    parameters, buffers or modules than its configuration says, or tensors that are no plain floating-point ones. Each
    file is written beside its final name and renamed: an interrupted save leaves the old one whole.
    """
    tensors = _tensors_to_save(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    with atomic_write(folder / CONFIG_FILE) as config_file, atomic_write(folder / WEIGHTS_FILE) as file:
        save_file(tensors, file, metadata={"format": "pt"})
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in (file, config_file):  # before either gets its name: the two belong together
            flush(path)
    if not (folder / GENERATION_FILE).exists():
        with atomic_write(folder / GENERATION_FILE) as path:
            path.write_text(json.dumps(_generation(model.config, tokenizer), indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder, model.config.n_positions)


def _generation(config: GPT2Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What transformers' `generate` has to know: where a text begins and ends, by the config or else by the
    tokenizer, and how long it can be."""
    values: dict[str, Any] = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    for name, value in values.items():
        if tokenizer is not None and (value is None or (isinstance(value, int) and value >= tokenizer.n_vocab)):
            values[name] = tokenizer.end_of_text
    # transformers' pipeline adds 256 tokens where nothing is said, which runs beyond a short context.
    values["max_length"] = config.n_positions if config.n_positions <= 512 else None
    return {name: value for name, value in values.items() if value is not None}


@torch.no_grad()
def resize_vocabulary(model: GPT2, n: int) -> None:
    """Give the model, in place, a vocabulary of n token ids: new ones after the old, or the last ones dropped.

    The embedding of a new token is the mean of the old ones, which makes it about as likely as they are on average
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). The head is the same parameter, or
    one of its own that is treated alike, and `model.config` is replaced. A matrix that has n rows already is kept as it
    is. Make the optimizer afterwards: one that was made before holds the old parameters. Raises ConfigError for an
    impossible n.
    """
    config = model.config.replace(vocab_size=n)
    matrices: dict[str, nn.Module] = {"wte": model.wte}
    if not config.tie_word_embeddings:
        matrices["lm_head"] = model.lm_head
    for name, module in matrices.items():
        if type(module.weight) is not nn.Parameter:
            kind = type(module.weight).__name__
            raise WeightsError(f"{name}.weight is a {kind}; resize the vocabulary while it is a plain parameter")
    for module in matrices.values():
        old = cast("nn.Parameter", module.weight)
        if len(old) != n:
            more = old.mean(0, keepdim=True).expand(max(0, n - len(old)), -1)
            module.weight = nn.Parameter(torch.cat([old[:n], more]), requires_grad=old.requires_grad)
    model.wte.num_embeddings = n
    if not config.tie_word_embeddings:
        model.lm_head.out_features = n
    model.config = config


def _tensors_to_save(model: GPT2) -> dict[str, Tensor]:
    """The parameters under the names that transformers gives them. Raises WeightsError unless they, and the modules
    that hold them, are those of a fresh GPT2 of the model's configuration."""
    with torch.device("meta"):
        fresh = GPT2(model.config)
    problems = []
    found: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = _WRAPPED.sub("", key)
        if name in found:
            problems.append(f"{name} is there twice")
        found[name] = tensor
    shapes = _shapes(fresh)
    problems += _misnamed(shapes, {name: name for name in found})
    for name, tensor in found.items():
        if name not in shapes:
            continue
        if type(tensor) not in (Tensor, nn.Parameter):
            problems.append(
                f"{name} is a {type(tensor).__name__}, not a plain tensor (a sharded one is gathered first)"
            )
        elif tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in _DTYPES.values():
            problems.append(f"{name} is a {tensor.layout} {tensor.dtype} tensor on {tensor.device}, not one of floats")
        elif tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the config asks for {shapes[name]}")
    # Shapes are not all: the weight of an nn.Linear may be square, and is transposed.
    modules = {_WRAPPED.sub("", f"{name}.")[:-1]: m for name, m in model.named_modules(remove_duplicate=False)}
    for name, module in fresh.named_modules():
        if name in modules and not isinstance(modules[name], type(module)):
            problems.append(f"{name} is a {type(modules[name]).__name__}, not a {type(module).__name__}")
    if problems:
        raise WeightsError(f"not saved, as it could not be loaded again: {_listed(problems)}. {_HOW_TO_SAVE}")
    tensors, storages = {}, set()
    for name in shapes:
        tensor = found[name].detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # Parameters that share memory, as tied ones do, are saved as many.
        saved = name if name == HEAD else f"transformer.{name}"
        tensors[saved] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors


def read_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for every official name in `shapes`, once all of them are known to be there, with the right
    shapes and floating-point dtypes. The tensors are views of the mapped files."""
    with ExitStack() as opened:
        found: dict[str, tuple[Any, str]] = {}  # official name -> (open file, name in the file)
        problems: list[str] = []
        for path in weight_files(folder):
            try:
                file = opened.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path}: not a whole safetensors file: {shown(str(error))}") from None
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name = _PREFIX.sub("", _WRAPPED.sub("", key))
                if _MASK_BUFFER.fullmatch(name):
                    continue
                if name in found:
                    problems.append(f"{name} is there twice, as {found[name][1]!r} and {key!r}")
                found[name] = (file, key)

        # Where the head is tied to the embedding, either of the two stands for both.
        head = None if HEAD in shapes else found.pop(HEAD, None)
        tied = found.setdefault("wte.weight", head) if head else None
        problems += _misnamed(shapes, {name: key for name, (_, key) in found.items()})
        there = [(name, shape, *found[name]) for name, shape in shapes.items() if name in found]
        there += [(HEAD, shapes["wte.weight"], *head)] if head else []
        for name, shape, file, key in there:
            piece = file.get_slice(key)
            if tuple(piece.get_shape()) != shape:
                problems.append(f"{name} has shape {tuple(piece.get_shape())}, the config asks for {shape}")
                if name == "wte.weight":
                    problems[-1] += "; vocab_size and n_embd must say what it is (resize_vocabulary changes it later)"
            if piece.get_dtype() not in _DTYPES:
                problems.append(f"{name} has dtype {piece.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        if not problems and head and tied and head != tied and not _equal(*head, *tied):
            problems.append(
                f"{HEAD} differs from wte.weight; a head of its own is loaded with tie_word_embeddings=False"
            )
        if problems:
            raise WeightsError(f"{folder}: {_listed(problems)}")
        for name in shapes:
            file, key = found[name]
            yield name, file.get_tensor(key)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or the shards that the index names."""
    present = {path.name for path in folder.iterdir()}
    for name in (WEIGHTS_FILE, SNAPSHOT_WEIGHTS):
        if name in present:
            return [folder / name]
    index = folder / INDEX_FILE
    if INDEX_FILE not in present:
        raise WeightsError(
            f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} (pickle files are not read); it holds "
            + (", ".join(map(shown, sorted(present))) or "nothing")
            + (f". {how_to_convert(str(folder))}" if any(name.startswith("pytorch_model") for name in present) else "")
        )
    names = shard_names(index)
    missing = [f"shard {shown(name)} is missing" for name in names if name not in present]
    if missing:
        raise WeightsError(f"{index}: {_listed(missing)}")
    return [folder / name for name in names]


def find_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a path or of a model of the hub, which is fetched if it is not here. Names are those of
    from_pretrained."""
    name, path = str(name_or_path), Path(name_or_path)
    if name not in OFFICIAL and path.is_dir():
        if revision is not None:
            raise WeightsError(f"revision {revision!r} is for a model of the hub, and {name!r} is a folder here")
        return weights_of(path)
    source = source_of(name, revision)
    if revision is None and (weights_root() / name).is_dir():
        return weights_root() / name
    return _fetch(name, source)


def weights_root() -> Path:
    """`weights/` of the checkout this package lies in, or of the current folder when it is installed elsewhere."""
    checkout = Path(__file__).resolve().parent.parent / "weights"
    return checkout if checkout.is_dir() else Path("weights")


def download(name: str) -> Path:
    """Fetch a model of the hub, official or `OWNER/NAME[@REVISION]`, into `weights/NAME` and check it. Returns the
    folder; one that is there is checked again.

    The folder appears only when its contents are verified; an interrupted download is repeated by calling this again.
    """
    source = source_of(name)
    folder = weights_root() / name
    if folder.exists():
        try:
            verify(folder / WEIGHTS_FILE, source)
            _check_tensors(folder)
        except WeightsError as error:
            raise WeightsError(f"{error}; delete {folder} and download again") from None
        return folder
    partial = folder.with_name(f".{folder.name}.part")
    _fetch(name, source, partial)
    _check_tensors(partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # huggingface_hub's notes, and what interruptions left
    partial.replace(folder)
    return folder


def _fetch(name: str, source: OfficialFile, folder: Path | None = None) -> Path:
    """Fetch a model with huggingface_hub, into `folder` or else its shared cache; return the folder it is in."""
    no_folder = "" if folder or source in OFFICIAL.values() else "no folder here, and "
    try:
        folder = fetch(source.repository, source.revision, folder)
    except NotFetched as error:
        raise WeightsError(f"{name}: {no_folder}{error}") from error
    path = folder / WEIGHTS_FILE
    try:
        verify(path, source)
    except WeightsError as error:
        # Or the hub's client would take it for fetched the next time. In its cache, path is a link.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise WeightsError(f"{error}; what was fetched is deleted") from None
    return folder


def _check_tensors(folder: Path) -> None:
    """Raise WeightsError or ConfigError unless the folder's tensors are there, in the shapes that its config has."""
    with torch.device("meta"):
        model = GPT2(GPT2Config.from_file(folder / CONFIG_FILE))
    next(read_tensors(folder, _shapes(model)))


def _equal(file: Any, key: str, other_file: Any, other_key: str) -> bool:
    """Whether two matrices of opened files have the same dtype and bits."""
    a, b = file.get_tensor(key), other_file.get_tensor(other_key)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _misnamed(shapes: dict[str, tuple[int, ...]], keys: dict[str, str]) -> list[str]:
    """What is missing from `keys` (official name -> name as it was found), and what is there beyond `shapes`. Beside
    the first that is missing stands the name most like it, since a prefix is often all that is wrong."""
    missing = [f"{name} {shape} is missing" for name, shape in shapes.items() if name not in keys]
    unexpected = [shown(keys[name]) for name in sorted(keys.keys() - shapes.keys())]
    if missing and unexpected:
        name = missing[0].split(" ")[0]
        missing[0] += f" (there is {difflib.get_close_matches(name, unexpected, 1, 0)[0]})"
    return missing + [f"{name} is unexpected" for name in unexpected]


def _listed(problems: list[str], most: int = 12) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
