"""The command line: `minigpt2 VERB`, where each verb calls one function.

What a verb needs is imported when it is called, so that the others start fast.
"""

from __future__ import annotations

import codecs
import os
import platform
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minigpt2 import __version__
from minigpt2.command_line import deferred, one_line_warnings, parsed, replace_unprintable

if TYPE_CHECKING:
    import torch

    from minigpt2.model import GPT2

__all__ = ["main"]


def generate(
    model: str,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    attention: str = "auto",
    device: str = "auto",
) -> None:
    """Continue a prompt, printing the text as it comes.

    Args:
        model: A folder with weights, or a model of the hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME.
        prompt: The text to continue.
        max_new_tokens: The most tokens to add; generation ends earlier at <|endoftext|> and at the context length.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Sample from the k likeliest tokens only.
        top_p: Sample from the smallest set of tokens that has this probability.
        seed: Makes the sampling repeatable.
        attention: Attention backend.
        device: cpu, cuda, cuda:N, mps, or auto: the best there is.
    """
    import torch

    from minigpt2.generate import stream
    from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer, token_bytes

    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"--seed must be from 0 to 2**64 - 1, got {seed}")
    network, place = _load(model, attention, device)
    ends = network.config.eos_token_ids or (END_OF_TEXT,)
    ids = torch.tensor([get_tokenizer().encode_ordinary(prompt)], dtype=torch.long, device=place)
    generator = None if seed is None else torch.Generator(place).manual_seed(seed)
    tokens = stream(
        network,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=ends,
        generator=generator,
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    unprinted = prompt  # until there is a token: an error stands on a line of its own
    for token in tokens:
        if token.item() in ends:
            continue
        print(unprinted + decoder.decode(token_bytes(int(token))), end="", flush=True)
        unprinted = ""
    print(unprinted + decoder.decode(b"", final=True))


def evaluate(
    model: str,
    data: str,
    stride: int | None = None,
    length: int | None = None,
    batch: int = 8,
    attention: str = "auto",
    device: str = "auto",
) -> None:
    """Score a text of any length: loss, perplexity, bits per byte and number of tokens.

    Args:
        model: A folder with weights, or a model of the hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME.
        data: UTF-8 text, a file or a folder of files; or a token file (.bin), such as val.bin of `minigpt2 prepare`.
        stride: Tokens from one window to the next, 1 to length: less is slower and gives more context. Default: half.
        length: Tokens of context, at most. Default: the model's context length.
        batch: Windows at a time.
        attention: Attention backend.
        device: cpu, cuda, cuda:N, mps, or auto: the best there is.
    """
    from minigpt2.evaluate import evaluate, tokens_of

    network, _ = _load(model, attention, device)
    with tokens_of(data) as tokens:
        result = evaluate(network, tokens, length=length, stride=stride, batch=batch, progress=True)
    print(f"loss {result.loss:.6f} nats per token, perplexity {result.perplexity:.4f}")
    print(f"bits per byte {result.bits_per_byte:.6f}, {result.tokens} tokens, {result.bytes} bytes")


def _load(model: str, attention: str, device: str) -> tuple[GPT2, torch.device]:
    """The model, on the device that is asked for. Raises ValueError if the attention asked for cannot serve there."""
    from minigpt2.device import pick_device
    from minigpt2.model import GPT2
    from minigpt2.ops.attention import resolve_backend

    place = pick_device(device)
    network = GPT2.from_pretrained(model, attention=attention)
    try:
        resolve_backend(attention, place.type, network.wte.weight.dtype, network.config.head_dim)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return network.to(place), place


def prepare(
    data: str,
    out: str,
    validation_fraction: float = 0.05,
    separator: str | None = None,
    workers: int | None = None,
) -> None:
    """Tokenise text into a folder that train.py --data takes: train.bin and val.bin. Run it again to continue.

    Args:
        data: UTF-8 text: a file, or a folder of files, each of them a document.
        out: The folder to write.
        validation_fraction: What part of the tokens goes to val.bin, in whole documents.
        separator: Text between the documents of one file, such as '<|endoftext|>'.
        workers: Processes. Default: one a CPU.
    """
    from minigpt2.data.prepare import prepare

    meta = prepare(data, out, validation_fraction=validation_fraction, separator=separator, workers=workers)
    train, validation = meta["train_tokens"], meta["validation_tokens"]
    print(f"{out}: {meta['documents']:,} documents, {train:,} training and {validation:,} validation tokens")


def download(name: Annotated[str, tyro.conf.Positional]) -> None:
    """Fetch a model of the Hugging Face hub into weights/NAME and check it.

    Args:
        name: gpt2, gpt2-medium, gpt2-large, gpt2-xl or OWNER/NAME; OWNER/NAME@REVISION is a commit, branch or tag.
    """
    from minigpt2.weights import download

    print(f"{name}: verified, in {download(name)}")


def plan(
    model: str = "gpt2",
    batch: int = 4,
    length: int = 1024,
    budget: str | None = None,
    optimizer: str = "adamw",
    device: Literal["cpu", "cuda"] = "cpu",
    plot: Path | None = None,
) -> None:
    """Print what a float32 training step needs at every notch of the dials, least memory first.

    Args:
        model: An official name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a folder with a config.json.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        budget: Memory of the whole process (on a CUDA device, of its tensors), such as 4GiB; auto: what is free on this
            machine. The fastest notch that fits it is marked.
        optimizer: adamw, sgd-momentum or sgd.
        device: Where the step would run; the device need not be here.
        plot: Also draw the frontier into this file, such as frontier.png.
    """
    import torch  # noqa: F401 (a part of what the process holds before the model)

    from minigpt2 import memory
    from minigpt2.config import OFFICIAL_SIZES, GPT2Config
    from minigpt2.device import resident_bytes
    from minigpt2.extras import import_extra

    if plot is not None:
        import_extra("plots", "matplotlib.figure", "--plot")
    config = GPT2Config.official(model) if model in OFFICIAL_SIZES else GPT2Config.from_file(Path(model, "config.json"))
    limit = None if budget is None else memory.parse_budget(budget, device)
    baseline = resident_bytes() if device == "cpu" else 0
    found = memory.notches(config, batch, length, optimizer=optimizer, device=device)
    peaks = f"include {memory.format_bytes(baseline)} of Python and torch" if baseline else "are those of CUDA tensors"
    allowed = f"; the budget is {memory.format_bytes(limit)}" if limit is not None else ""
    print(f"{model}, batch {batch} x {length}, float32, {optimizer}; peaks {peaks}{allowed}")
    print(memory.table(found, limit, baseline))
    if plot is not None:
        memory.plot(found, plot, limit, baseline)
    if limit is not None:
        memory.fastest_that_fits(found, limit, baseline)  # raises, and says what the least is


def bench() -> None:
    """Measure this machine: minigpt2 bench attention | generate | loss | memory | step."""
    from minigpt2.bench.attention import bench_attention
    from minigpt2.bench.generate import bench_generate
    from minigpt2.bench.loss import bench_loss
    from minigpt2.bench.memory import bench_memory
    from minigpt2.bench.step import bench_step

    benchmarks: dict[str, Callable[..., object]] = {
        "attention": bench_attention,
        "generate": bench_generate,
        "loss": bench_loss,
        "memory": bench_memory,
        "step": bench_step,
    }
    _run(benchmarks, "minigpt2 bench", sys.argv[2:])


def train() -> int:
    """Train a model, or fine-tune one. This is train.py."""
    here = Path(__file__).parent
    # A wheel has train.py in the package; in a checkout it lies beside it, for people to read.
    path = next(path for path in (here / "_train.py", here.parent / "train.py") if path.exists())
    loader = SourceFileLoader("minigpt2._train", str(path))
    spec = spec_from_file_location(loader.name, path, loader=loader)  # with the file, where tyro reads docstrings
    assert spec is not None
    module = sys.modules[loader.name] = module_from_spec(spec)
    loader.exec_module(module)
    sys.argv = ["minigpt2 train", *sys.argv[2:]]
    return int(module.main())


def info() -> None:
    """Print versions, device, and which attention backend is used and why."""
    from importlib.metadata import version

    import torch

    from minigpt2.ops.attention import explain_backend
    from minigpt2.ops.products import explain_products

    print(f"minigpt2 {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in ("safetensors", "tiktoken", "numpy", "huggingface_hub")))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"device: {device}; {torch.get_num_threads()} CPU threads, {capability}")
    print(f"attention: {explain_backend()}")
    print(f"products of training, float32 on the CPU: {explain_products()}")


def _run(verbs: dict[str, Callable[..., Any]], prog: str, arguments: list[str], description: str | None = None) -> None:
    """Run the verb that the arguments name. Raises ValueError for arguments that cannot be read."""
    calls = {name: deferred(verb) for name, verb in verbs.items()}
    parsed(lambda: tyro.extras.subcommand_cli_from_dict(calls, prog=prog, description=description, args=arguments))()


def main() -> int:
    """Run one verb; the exit status is 2 for a user's mistake."""
    verbs: dict[str, Callable[..., object]] = {"train": train, "generate": generate, "eval": evaluate}
    verbs |= {"prepare": prepare, "plan": plan, "bench": bench, "download": download, "info": info}
    replace_unprintable()
    if sys.argv[1:2] == ["train"]:  # it has an exit status of its own
        return train()
    try:
        with one_line_warnings("minigpt2"):
            if sys.argv[1:2] == ["bench"]:  # it has verbs of its own
                bench()
            else:
                _run(verbs, "minigpt2", sys.argv[1:], __doc__)
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would fail to flush
        return 141
    except (ValueError, OSError) as error:
        print(f"minigpt2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
