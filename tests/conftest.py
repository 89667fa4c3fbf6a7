"""Fixtures shared by the tests: a tiny configuration, and checkpoints written by transformers at tiny and true size."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tests run beside each other: no thread should spin
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Before anything imports Triton, which transformers does: where there is no GPU, its interpreter runs our kernels.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from hugging_face import first_tokens, random_hf
from transformers import GPT2Config as HFConfig

import minigpt2.ops.products
from minigpt2 import GPT2, GPT2Config
from minigpt2.machine import free_bytes

OFFICIAL_GPT2 = Path(__file__).parent.parent / "weights" / "gpt2"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One for each processor, as far as memory goes; tests that take all of a machine run one after another."""
    if any(marker in config.option.markexpr for marker in ("large", "cuda")):
        return 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(ValueError):  # a system that does not say
        processors = min(processors, free_bytes() // (3 << 30))
    return max(1, min(8, processors))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run or what must be asked for by `-m`."""
    asked = config.option.markexpr
    reasons = {
        "official": None if OFFICIAL_GPT2.is_dir() else "needs the official weights: minigpt2 download gpt2",
        "cuda": None if torch.cuda.is_available() else "needs a CUDA device",
        "grid": None if "grid" in asked else "takes minutes: run with pytest -m grid",
        "slow": None if "slow" in asked else "takes long and rarely breaks: run with pytest -m slow",
        "large": None if "large" in asked else "takes minutes and 20 GiB of memory: run with pytest -m large",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_config() -> GPT2Config:
    return GPT2Config(
        vocab_size=503, n_positions=64, n_embd=64, n_layer=3, n_head=4, bos_token_id=502, eos_token_id=502
    )


@pytest.fixture(scope="session")
def hf_tiny(tiny_config: GPT2Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which transformers saved a random model of `tiny_config`, with the first of GPT-2's tokens. Not to be
    written to."""
    folder = tmp_path_factory.mktemp("hf_tiny")
    first_tokens(folder, tiny_config.vocab_size)
    random_hf(HFConfig(**tiny_config.to_dict())).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hf_124m(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which transformers saved a random model at the true shapes of gpt2 (half a gigabyte)."""
    folder = tmp_path_factory.mktemp("hf_124m")
    random_hf(HFConfig()).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["torch.mm", "oneDNN"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that makes all of a test's float32 products, of any size, on a processor of any kind."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(minigpt2.ops.products, "_onednn_is_faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(minigpt2.ops.products, "ONEDNN_LEAST", 0)
    return request.param


@pytest.fixture
def tiny_model(hf_tiny: Path) -> GPT2:
    """`hf_tiny` as our model, in evaluation mode; each test gets its own."""
    return GPT2.from_pretrained(hf_tiny)
