"""Random command lines of minigpt2 and of train.py: each ends with status 0, or with status 2 and one line;
training that meets numbers which are not finite, with status 1 and one line.
Run by hand: python tests/fuzz_cli.py --n 300 --seed 0"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from fuzzing import Finding, main

import train
from minigpt2 import GPT2, GPT2Config
from minigpt2 import __main__ as cli

SECONDS = 60
INTEGERS = ["0", "1", "2", "3", "-1", "1.5", "many", "", "None", "99999999999999999999", "1_0", "0x2", "1e2"]
NUMBERS = ["0", "0.5", "1", "-1", "nan", "inf", "-inf", "1e308", "1e-300", "half", ""]
TEXTS = ["hello", " ", "", "<|endoftext|>", "a\nb", "\udcff\ud800", "naïve 漢 👩‍🚀", "--", "-x", "long " * 30]
MODELS = [
    "model",
    "model",
    "model",
    "nan",
    "damaged",
    "nothing",
    "gpt3",
    "",
    "text.txt",
    ".",
    "\0",
    "x" * 300,
    "folder",
]
DATA = [
    "text.txt",
    "text.txt",
    "tokens.bin",
    "odd.bin",
    "folder",
    "binary",
    "empty",
    "nothing",
    ".",
    "",
    "tokens",
    "\0",
]
OUTS = ["out", "new/out", "text.txt", "text.txt/out", "tokens", "", "/proc/out", "x" * 300, "\0"]
DEVICES = ["auto", "cpu", "cpu", "cuda:7", "mps", "meta", "abacus", "", "cpu:1", "cuda:-1", "xla"]
ATTENTION = ["auto", "eager", "sdpa", "fused", "flash", ""]

# Of each verb, its options and what they may be given.
VERBS: dict[str, dict[str, list[str]]] = {
    "generate": {
        "--model": MODELS,
        "--prompt": TEXTS,
        "--file": ["text.txt", "binary", "empty", "nothing", "folder", "-", ""],
        "--num": ["1", "2", "0", "-1", "many"],
        "--max-new-tokens": INTEGERS,
        "--temperature": NUMBERS,
        "--top-k": INTEGERS,
        "--top-p": NUMBERS,
        "--seed": INTEGERS,
        "--attention": ATTENTION,
        "--device": DEVICES,
    },
    "eval": {
        "--model": MODELS,
        "--data": DATA,
        "--stride": INTEGERS,
        "--length": [*INTEGERS, "16", "17"],
        "--batch": INTEGERS,
        "--attention": ATTENTION,
        "--device": DEVICES,
    },
    "prepare": {
        "--data": DATA,
        "--out": OUTS,
        "--validation-fraction": NUMBERS,
        "--separator": ["None", "", "\n\n", "<|endoftext|>", "é", "\udcff"],
        "--workers": ["1", "1", "0", "-1", "many", "1.5"],
    },
    "plan": {
        "--model": ["gpt2", "gpt2-xl", *MODELS],
        "--batch": INTEGERS,
        "--length": [*INTEGERS, "1025"],
        "--budget": ["4GiB", "1KiB", "4", "many GiB", "-1GiB", "", "nan GiB", "1e400GiB", "9" * 400],
        "--optimizer": ["adamw", "sgd", "sgd-momentum", "lion", ""],
        "--device": ["cpu", "cuda", "mps"],
        "--plot": ["plot.png", "plot.xyz", "nothing/plot.png", "model", "", "\0.png"],
    },
    "bench": {
        "--repeats": ["0", "-1", "many"],
        "--shapes": ["1", "a"],
        "--model": ["gpt3", ""],
        "--steps": ["0", "-1"],
    },
    "download": {"--name": ["gpt2"]},
    "info": {},
}
POSITIONALS = ["attention", "generate", "memory", "step", "gpt2", "gpt3", "fly", "", "--help", "-h", "--", "extra"]

# What keeps a run of train.py small, and what may replace or join it.
SMALL = {
    "--data": "text.txt",
    "--n-layer": "1",
    "--n-head": "1",
    "--n-embd": "8",
    "--length": "16",
    "--batch": "2",
    "--max-steps": "1",
    "--eval-batches": "1",
    "--device": "cpu",
}
SIZES = ["1", "2", "3", "0", "-1", "1.5", "many", "99999999999999999999", "10000000000"]
COUNTS = ["1", "2", "0", "-1", "many", "1.5", ""]
TRAIN: dict[str, list[str]] = {
    "--data": DATA,
    "--out": OUTS,
    "--init": [*MODELS, "None"],
    **{f"--{name}": INTEGERS[:10] for name in ("n-layer", "eval-every", "snapshot-every", "keep", "warmup", "seed")},
    **{f"--{name}": SIZES for name in ("n-head", "n-embd", "length", "batch")},
    **{f"--{name}": COUNTS for name in ("max-steps", "accumulate", "eval-batches")},
    **{f"--{name}": NUMBERS for name in ("dropout", "weight-decay", "clip")},
    "--lr": ["0", "1e-3", "-1", "nan", "inf", "high", ""],
    "--checkpoint-every": ["0", "1", "2", "-1", "many"],
    "--recompute": ["block", "keep-attention", "pointwise", "all", ""],
    "--memory-budget": ["4GiB", "1KiB", "many", "", "-1GiB"],
    "--attention": ATTENTION,
    "--device": DEVICES,
    "--precision": ["fp32", "bf16", "fp16", "fp8"],
    "--parallel": ["None", "ddp", "fsdp", "tp"],
    "--on-nonfinite": ["stop", "skip", "cry"],
    "--resume": [],
    "--no-resume": [],
}


@functools.cache
def surroundings() -> Path:
    """A folder of models, texts and tokens to name."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        model.ln_f.bias[0] = float("nan")
    model.save_pretrained(folder / "nan")
    shutil.copytree(folder / "model", folder / "damaged")
    with (folder / "damaged" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    text = "One line after another, and none of them is long.\n" * 40
    (folder / "text.txt").write_text(text)
    (folder / "folder").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "folder" / name).write_text(text)
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "empty").touch()
    (folder / "odd.bin").write_bytes(b"odd")
    (folder / "tokens").mkdir()
    for path in (folder / "tokens.bin", folder / "tokens" / "train.bin", folder / "tokens" / "val.bin"):
        np.arange(100, dtype="<u2").tofile(path)
    return folder


def options(rng: random.Random, known: dict[str, list[str]], most: int) -> list[str]:
    words = []
    for name in rng.sample(list(known), min(len(known), rng.randint(0, most))):
        value = [rng.choice(known[name])] if known[name] else []
        words += rng.choice([*8 * [[name, *value]], [name], [f"{name}={''.join(value)}"], [f"{name}x", *value]])
    return words


def command_line(rng: random.Random) -> list[str]:
    """Program and arguments."""
    if rng.random() < 0.5:
        verb = rng.choice([*VERBS, *VERBS, "fly", "--help", ""])
        known = VERBS.get(verb, VERBS["generate"])
        required = {name: known[name][0] for name in ("--model", "--prompt", "--data", "--out") if name in known}
        words = [w for pair in required.items() for w in pair] if rng.random() < 0.7 and verb != "plan" else []
        given = options(rng, known, 3)
        words = [w for pair in required.items() if pair[0] not in given for w in pair] if words else []
        if verb == "bench" and not given:
            given = ["--help"]  # and not the benchmark itself
        extra = [rng.choice(POSITIONALS)] if verb in ("bench", "download") or rng.random() < 0.1 else []
        return ["minigpt2", verb, *extra, *words, *given]
    given = options(rng, TRAIN, 3)
    small = [w for pair in SMALL.items() if pair[0] not in given for w in pair]
    extra = [rng.choice(POSITIONALS)] if rng.random() < 0.1 else []
    return [*rng.choice([["train.py"], ["minigpt2", "train"]]), *small, *given, "--no-tune-allocator", *extra]


def late(number: int, frame: object) -> None:
    raise Finding(f"not done in {SECONDS} seconds")


def case(rng: random.Random, counts: Counter[str]) -> None:
    arguments = command_line(rng)
    out, err = io.StringIO(), io.StringIO()
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(surroundings(), folder, dirs_exist_ok=True)
    before, old_alarm = Path.cwd(), signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        os.chdir(folder)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(rng.choice(TEXTS[:4]).encode()))),
            mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("default")
            try:
                status = train.main() if arguments[0] == "train.py" else cli.main()
            except SystemExit as end:  # --help
                status = end.code or 0
    except BaseException as error:
        raise Finding(f"{arguments}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_alarm)
        os.chdir(before)
        shutil.rmtree(folder)
    lines = map(str.strip, re.split(r"[\r\n]+", err.getvalue()))
    beside = r" gone, .* left$|^(train\.py|minigpt2( train)?): attention takes the slower"  # progress, and a warning
    said = [line for line in lines if line and not re.search(beside, line)]
    stopped = status == 1 and "train" in arguments[0] + arguments[1] and "finite" in err.getvalue()
    if not (status in (0, 2) or stopped) or (status and len(said) != 1):
        raise Finding(f"{arguments}: status {status}, said {said}")
    counts[f"{arguments[0]} {status}"] += 1


if __name__ == "__main__":
    main(case, n=300)
