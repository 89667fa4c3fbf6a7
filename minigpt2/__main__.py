"""The command line: `minigpt2 VERB`, where each verb calls one function, whose docstring is its help.

What a verb needs is imported when it is called, so that the others start fast.
"""

from __future__ import annotations

import inspect
import platform
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minigpt2 import __version__, command_line
from minigpt2.command_line import ATTENTIONS, optional, parsed
from minigpt2.data.documents import TextOptions

if TYPE_CHECKING:
    import torch

    from minigpt2.model import GPT2
    from minigpt2.tokenizer import Tokenizer

__all__ = ["main"]

DESCRIPTION = "Train GPT-2, fine-tune it, and use it. `minigpt2 VERB --help` lists the options of a verb."
Text = Annotated[TextOptions, tyro.conf.arg(name="")]


def generate(
    model: str,
    prompt: Annotated[str | None, optional("TEXT")] = None,
    file: Annotated[Path | None, optional("FILE")] = None,
    num: int = 1,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: Annotated[int | None, optional("INT")] = None,
    top_p: Annotated[float | None, optional("FLOAT")] = None,
    seed: Annotated[int | None, optional("INT")] = None,
    attention: Annotated[str, ATTENTIONS] = "auto",
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Continue a text, and print it as it comes.
    $ minigpt2 generate --model gpt2 --prompt "Once upon a time"

    Args:
        model: A model of the hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME), or a folder, such as that of a
            run.
        prompt: The text to continue; '' begins a new one. Default: what comes from standard input; on a terminal you
            type texts for the model to continue, until Ctrl-D.
        file: Continue the text of this file instead, without the newline at its end; - is standard input.
        num: How many samples to make.
        max_new_tokens: The most tokens to add. A sample ends earlier where the model ends its text, with <|endoftext|>,
            or reaches the end of its context.
        temperature: Lower is more predictable, higher more varied; 0 always takes the likeliest token.
        top_k: Choose each token from the k likeliest only. Default: from all.
        top_p: Choose each token from the likeliest that together have this probability. Default: 1, all.
        seed: A number that makes the samples repeatable. Default: others every time.
        attention: What computes attention: auto, eager, sdpa or fused (`minigpt2 info` says which auto is).
        device: cpu, cuda, cuda:N, mps, or auto, the best there is.
        dtype: Of weights and cache; bfloat16 takes half of the memory and is faster, with logits of fewer digits.
    """
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"--seed must be from 0 to 2**64 - 1, got {seed}")
    if num < 1:
        raise ValueError(f"--num must be >= 1, got {num}")
    import torch

    from minigpt2.console import converse, print_samples, read_prompt

    text = read_prompt(prompt, file)
    if text is None and num > 1:
        raise ValueError(f"--num {num} needs a text to continue: give --prompt or --file")
    network, tokenizer, place = _load(model, attention, device, dtype)
    generator = None if seed is None else torch.Generator(place).manual_seed(seed)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    if text is None:
        converse(network, tokenizer, max_new_tokens, **sampling)
    else:
        print_samples(network, tokenizer, text, num, max_new_tokens, **sampling)


def evaluate(
    model: str,
    data: str,
    stride: Annotated[int | None, optional("INT")] = None,
    length: Annotated[int | None, optional("INT")] = None,
    batch: int = 8,
    attention: Annotated[str, ATTENTIONS] = "auto",
    device: str = "auto",
    json: bool = False,
    text: Text = TextOptions(),  # noqa: B008 (frozen)
) -> None:
    """Measure how well a model predicts a text: loss, perplexity and bits per byte.
    $ minigpt2 eval --model gpt2 --data book.txt

    Args:
        model: A model of the hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME), or a folder, such as that of a
            run.
        data: What train --data takes: text, JSON lines or Parquet, plain or compressed, in a file, a folder of files or
            a pipe. A folder from `minigpt2 prepare` gives its validation tokens; a token file (.bin) all of its own.
        stride: The text is read in windows; this many tokens lie from one to the next. Fewer are slower, and give the
            model more context. Default: half the length.
        length: Tokens in a window. Default: the model's context length.
        batch: Windows at a time.
        attention: What computes attention: auto, eager, sdpa or fused (`minigpt2 info` says which auto is).
        device: cpu, cuda, cuda:N, mps, or auto, the best there is.
        json: Print one JSON object instead of two lines.
        text: How files are read as documents.
    """
    from json import dumps

    from minigpt2.evaluate import evaluate, tokens_of

    network, tokenizer, _ = _load(model, attention, device)
    with tokens_of(data, text, tokenizer=tokenizer, progress=not json) as tokens:
        settings: dict[str, Any] = {"length": length, "stride": stride, "batch": batch, "tokenizer": tokenizer}
        result = evaluate(network, tokens, **settings, progress=not json)
    if json:
        return print(dumps(result._asdict()))
    print(f"loss {result.loss:.6f} nats per token, perplexity {result.perplexity:.4f}")
    print(f"bits per byte {result.bits_per_byte:.6f}, {result.tokens} tokens, {result.bytes} bytes")


def _load(model: str, attention: str, device: str, dtype: str = "float32") -> tuple[GPT2, Tokenizer, torch.device]:
    """The model, on the device that is asked for, and its tokenizer. Raises ValueError if the attention asked for
    cannot serve there."""
    import torch

    from minigpt2.device import pick_device
    from minigpt2.model import GPT2
    from minigpt2.ops.attention import resolve_backend
    from minigpt2.tokenizer_files import load_tokenizer
    from minigpt2.weights import find_folder

    place = pick_device(device)
    network = GPT2.from_pretrained(model, attention=attention, dtype=getattr(torch, dtype))
    tokenizer = load_tokenizer(find_folder(model), network.config.vocab_size)
    try:
        resolve_backend(attention, place.type, network.wte.weight.dtype, network.config.head_dim)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return network.to(place), tokenizer, place


def parity(
    model: Annotated[str, tyro.conf.Positional],
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
    attention: Annotated[str, ATTENTIONS] = "auto",
    data: Annotated[str | None, optional("PATH")] = None,
    length: int = 256,
    json: bool = False,
) -> int:
    """Compare with transformers on the same files: PASS, or the first module that differs and exit status 1.
    $ minigpt2 parity gpt2

    Args:
        model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/NAME on the Hugging Face hub, or a folder with weights.
        dtype: Of both. The finer it is, the smaller a fault may be to be seen.
        attention: What computes attention in minigpt2: auto, eager, sdpa or fused; in transformers it is eager.
        data: UTF-8 text, a file or a folder of files; or a token file (.bin). Default: Python's standard library.
        length: Tokens in each of two sequences, at most.
        json: Print one JSON object instead of the table.
    """
    from json import dumps

    from minigpt2.parity import parity

    found = parity(model, dtype=dtype, attention=attention, data=data, length=length, say=_unsaid if json else print)
    if json:
        print(dumps(found.to_json(), indent=2))
    return 1 if found.faults else 0


def _unsaid(line: str) -> None:
    pass


def prepare(
    data: str,
    out: str,
    validation_fraction: float = 0.05,
    renew: bool = False,
    workers: Annotated[int | None, optional("INT")] = None,
    tokenizer: Annotated[Path | None, optional("FOLDER")] = None,
    text: Text = TextOptions(),  # noqa: B008 (frozen)
) -> None:
    """Turn text into tokens once, for many runs: train --data takes the folder.
    $ minigpt2 prepare --data texts/ --out tokens/

    Args:
        data: Text, JSON lines or Parquet, plain or compressed (gzip, zstd), in a file, a folder of files or a pipe such
            as /dev/stdin.
        out: The folder to write: train.bin and val.bin. Stopped in the middle, the same command goes on.
        validation_fraction: What part of the tokens is kept for validation, in whole documents where they are many.
        renew: Replace the tokens in --out if the files or the settings are others now.
        workers: Processes to work with. Default: one for each CPU.
        tokenizer: A folder with the tokenizer of the model to train. Default: OpenAI's.
        text: How files are read as documents.
    """
    from minigpt2.data.prepare import prepare
    from minigpt2.tokenizer import TokenizerError, get_tokenizer
    from minigpt2.tokenizer_files import read_tokenizer

    found = get_tokenizer() if tokenizer is None else read_tokenizer(tokenizer)
    if found is None:
        raise TokenizerError(f"--tokenizer {tokenizer}: there is no tokenizer.json, nor vocab.json and merges.txt")
    settings: dict[str, Any] = {"renew": renew, "workers": workers, "tokenizer": found}
    meta = prepare(data, out, text, validation_fraction=validation_fraction, **settings)
    train, validation = meta["train_tokens"], meta["validation_tokens"]
    print(f"{out}: {meta['documents']:,} documents, {train:,} training and {validation:,} validation tokens")


def download(name: Annotated[str, tyro.conf.Positional]) -> None:
    """Fetch a model of the Hugging Face hub into weights/NAME, and check it.
    $ minigpt2 download gpt2

    Args:
        name: gpt2, gpt2-medium, gpt2-large, gpt2-xl or OWNER/NAME; OWNER/NAME@REVISION is a commit, branch or tag.
    """
    from minigpt2.weights import download

    print(f"{name}: verified, in {download(name)}")


def plan(
    model: str = "gpt2",
    batch: int = 4,
    length: int = 1024,
    budget: Annotated[str | None, optional("AMOUNT")] = None,
    optimizer: str = "adamw",
    device: Literal["cpu", "cuda"] = "cpu",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    plot: Annotated[Path | None, optional("FILE")] = None,
    json: bool = False,
) -> None:
    """Say how much memory training needs at each setting of --checkpoint-every and --recompute, and of --moments inside
    the backward pass.
    $ minigpt2 plan --model gpt2 --batch 4 --budget 4GiB

    The columns of the table: ordinary, the optimizer steps after the backward pass; in backward, inside it; bf16 and
    8bit, inside it with moments in two bytes or one.

    Args:
        model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with a config.json.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        budget: Mark the fastest setting that fits this much memory, such as 4GiB or 900MiB; auto is all that is free
            here. It counts the whole process, on a CUDA device only its tensors. Default: none is marked.
        optimizer: adamw, muon, sgd-momentum or sgd.
        device: Where the training would run; the device need not be here.
        precision: What matrix products are computed in, as in training; fp16 with --device cuda only.
        plot: Also draw extra work over memory into this file, such as plan.png. Default: no picture.
        json: Print a JSON list of all settings, in bytes, least memory first, instead of the table.
    """
    import torch  # noqa: F401 (a part of what the process holds before the model)

    from minigpt2 import frontier, memory
    from minigpt2.config import OFFICIAL_SIZES, GPT2Config
    from minigpt2.device import resident_bytes
    from minigpt2.extras import import_extra

    if plot is not None:
        import_extra("plots", "matplotlib.figure", "--plot")
    config = GPT2Config.official(model) if model in OFFICIAL_SIZES else GPT2Config.from_file(Path(model, "config.json"))
    limit = None if budget is None else memory.parse_budget(budget, device)
    baseline = resident_bytes() if device == "cpu" else 0
    ways = memory.steppings(optimizer, in_backward=precision != "fp16")
    found = frontier.notches(config, batch, length, ways, optimizer=optimizer, device=device, precision=precision)
    peaks = f"include {memory.format_bytes(baseline)} of Python and torch" if baseline else "are those of CUDA tensors"
    allowed = f"; the budget is {memory.format_bytes(limit)}" if limit is not None else ""
    if json:
        print(frontier.as_json(found, limit, baseline))
    else:
        print(f"{model}, batch {batch} x {length}, {precision}, {optimizer}; peaks {peaks}{allowed}")
        print(frontier.table(found, limit, baseline))
    if plot is not None:
        from minigpt2 import pictures

        pictures.frontier(found, plot, limit, baseline)
    if limit is not None:
        frontier.fastest_that_fits(found, limit, baseline)  # raises, and says what the least is


def bench() -> None:
    """Measure this machine: bench attention, generate, learning, loss, memory, step or timeline.
    $ minigpt2 bench step --model small
    """
    from minigpt2.bench.attention import bench_attention
    from minigpt2.bench.generate import bench_generate
    from minigpt2.bench.learning import bench_learning
    from minigpt2.bench.loss import bench_loss
    from minigpt2.bench.memory import bench_memory
    from minigpt2.bench.step import bench_step
    from minigpt2.bench.timeline import bench_timeline

    found = (bench_attention, bench_generate, bench_learning, bench_loss, bench_memory, bench_step, bench_timeline)
    benchmarks: dict[str, Callable[..., Any]] = {f.__name__.removeprefix("bench_"): f for f in found}
    _run(benchmarks, "minigpt2 bench", sys.argv[2:], inspect.getdoc(bench))


def train() -> int:
    """Train a model on your text, or fine-tune one.
    $ minigpt2 train --data texts/ --out runs/first
    $ minigpt2 train --data texts/ --init gpt2 --out runs/tuned
    """
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


def info(json: bool = False) -> None:
    """Print versions, the device, and which attention backend is used here and why.
    $ minigpt2 info

    Args:
        json: Print one JSON object instead of lines.
    """
    from importlib.metadata import version
    from json import dumps

    import torch

    from minigpt2.device import pick_device
    from minigpt2.ops.attention import explain_backend
    from minigpt2.ops.products import explain_products
    from minigpt2.training.precision import fastest_precision

    versions = {"minigpt2": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    others = {name: version(name) for name in ("safetensors", "tiktoken", "numpy", "huggingface_hub")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    precision, reason = fastest_precision(pick_device("auto"))
    lines = {
        "device": f"{device}; {torch.get_num_threads()} CPU threads, {capability}",
        "attention": explain_backend(),
        "products of training, float32 on the CPU": explain_products(),
        "train --precision auto": f"{precision}, since {reason}",
    }
    if json:
        return print(dumps(versions | others | lines, indent=2))
    for found in (versions, others):
        print(", ".join(" ".join(pair) for pair in found.items()))
    print("\n".join(": ".join(pair) for pair in lines.items()))


VERBS: dict[str, Callable[..., Any]] = {
    **{"train": train, "generate": generate, "eval": evaluate, "parity": parity, "prepare": prepare},
    **{"plan": plan, "bench": bench, "download": download, "info": info},
}


def _run(verbs: dict[str, Callable[..., Any]], prog: str, arguments: list[str], description: str | None = None) -> Any:
    """The result of the verb that the arguments name. Raises ValueError for arguments that cannot be read."""
    calls = {name: command_line.deferred(verb) for name, verb in verbs.items()}
    return parsed(
        lambda: tyro.extras.subcommand_cli_from_dict(calls, prog=prog, description=description, args=arguments)
    )()


def main() -> int:
    """Run one verb; the exit status is 2 for a user's mistake, and 1 where two models differ."""
    command_line.replace_unprintable()
    if sys.argv[1:2] == ["train"]:  # it has an exit status of its own
        return train()
    try:
        with command_line.one_line_warnings("minigpt2"):
            if sys.argv[1:2] == ["bench"]:  # it has verbs of its own
                bench()
            else:
                return _run(VERBS, "minigpt2", sys.argv[1:], DESCRIPTION) or 0
    except BrokenPipeError:
        return command_line.reader_left()
    except (ValueError, OSError) as error:
        print(f"minigpt2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
