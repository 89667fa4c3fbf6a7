"""Models of the Hugging Face hub, fetched with huggingface_hub: config.json, safetensors and the tokenizer's files."""

from __future__ import annotations

import json
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt2.config import ConfigError, GPT2Config
from minigpt2.files import sha256_of
from minigpt2.progress import of_downloads

__all__ = [
    "OFFICIAL",
    "NotFetched",
    "OfficialFile",
    "WeightsError",
    "fetch",
    "how_to_convert",
    "shard_names",
    "shown",
    "source_of",
    "verify",
]

WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"

# What else belongs to a model, where its repository has it.
OTHER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json"),
)

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class WeightsError(ValueError):
    """Weights that are absent, damaged, or do not fit the configuration. Names the file and every tensor at fault."""


class NotFetched(WeightsError):
    """A model that the hub does not have, or does not give."""


@dataclass(frozen=True)
class OfficialFile:
    """A published model.safetensors, in a repository of the Hugging Face hub."""

    repository: str
    revision: str | None = None
    """A commit, branch or tag; None stands for the newest."""
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

# Other models that have long been known without an owner's name.
_OTHERS = {"distilgpt2": "distilbert/distilgpt2"}


def source_of(name: str, revision: str | None = None) -> OfficialFile:
    """Where on the hub the model of this name is: an official one or OWNER/NAME, and either may have a revision. Raises
    WeightsError for what is no name."""
    base, at, given = name.partition("@")
    if at and (not given or revision is not None):
        raise WeightsError(f"{name!r} must be followed by one revision, in the name or as an argument")
    revision = given or revision
    if base in OFFICIAL:
        return OfficialFile(OFFICIAL[base].repository, revision) if revision else OFFICIAL[base]
    repository = _OTHERS.get(base, base)
    if not _REPOSITORY.fullmatch(repository):
        names = ", ".join(OFFICIAL)
        raise WeightsError(f"{name!r} is neither an official name ({names}), nor OWNER/NAME, nor a folder with weights")
    return OfficialFile(repository, revision)


def fetch(repository: str, revision: str | None = None, folder: Path | None = None) -> Path:
    """Fetch a model's files, all of one commit, into the shared cache of huggingface_hub, or into `folder`; return the
    folder that they lie in.

    Files that are there already are not fetched again, and the hub need not be reached for them. Weights are the last,
    and are not asked for where config.json is that of another kind of model: that raises ConfigError. `revision`: a
    commit, branch or tag. Raises NotFetched, in one line, for a model that the hub does not have or does not give, and
    for one without safetensors.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def get(file: str) -> Path:
        where: dict[str, Any] = {"revision": revision, "local_dir": folder}
        return Path(hf_hub_download(repository, file, **where | of_downloads(hf_hub_download)))

    wanted = f"{repository} at {revision[:8] if _COMMIT.fullmatch(revision) else revision}" if revision else repository
    try:
        config = get(CONFIG_FILE)
        _check_kind(config)
        if folder is None and _COMMIT.fullmatch(config.parent.name):
            revision = config.parent.name
        for file in OTHER_FILES:
            with suppress(EntryNotFoundError):
                get(file)
        try:
            get(WEIGHTS_FILE)
        except EntryNotFoundError:
            for shard in shard_names(get(INDEX_FILE)):
                get(shard)
    except (ConfigError, WeightsError):
        raise
    except Exception as error:  # the hub's own, its HTTP client's and the system's: all of them mean "not fetched"
        raise NotFetched(f"could not be fetched from {wanted}: {_reason(error, repository)}") from None
    return config.parent


def _check_kind(config: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever loads the model will be warned
        GPT2Config.from_file(config)


def _reason(error: Exception, repository: str) -> str:
    """What an error of huggingface_hub means to whoever asked for a model, in one line."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        address = f"https://huggingface.co/{repository}"
        return f"it is gated: accept its terms at {address}, then log in with hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository on the hub, or it is private: log in with hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return f"{why}, and the cache of huggingface_hub, {constants.HF_HUB_CACHE}, does not hold all of it"
    if isinstance(error, errors.EntryNotFoundError):
        return f"it lacks {CONFIG_FILE}, or {WEIGHTS_FILE} and {INDEX_FILE}. {how_to_convert(repository)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def how_to_convert(source: str) -> str:
    """What to do about weights that are pickled."""
    return (
        "A pytorch_model.bin is a pickle, which can run any code, and is not read; convert it once, with transformers: "
        f"GPT2LMHeadModel.from_pretrained({source!r}).save_pretrained('FOLDER')"
    )


def shard_names(index: Path) -> list[str]:
    """The names of the files that an index of shards lists; WeightsError for what is none."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        bad = [name for name in names if Path(name).name in ("", "..") or Path(name).parent.parts]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise WeightsError(f"{index}: not an index of safetensors shards: {error!r}") from None
    if bad:
        raise WeightsError(f"{index}: {'; '.join(f'{shown(name)!r} is not a file name' for name in bad[:12])}")
    return names


def shown(text: str, most: int = 200) -> str:
    """What comes from a file as it can be printed: in one line, of some length."""
    return repr(text[:most])[1:-1]


def verify(path: Path, official: OfficialFile) -> None:
    """Raise WeightsError unless the file has the size and digest that are known of it, if any are."""
    if official.size is None and official.sha256 is None:
        return
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if official.size is not None and path.stat().st_size != official.size:
        raise WeightsError(f"{path}: {path.stat().st_size} bytes, expected {official.size}")
    if official.sha256 is not None and (digest := sha256_of(path)) != official.sha256:
        raise WeightsError(f"{path}: sha256 is {digest}, expected {official.sha256}")
