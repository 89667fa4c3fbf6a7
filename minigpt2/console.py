"""Text from the command line, a file, a pipe or a terminal, and its continuations, printed as they come."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from minigpt2.generate import ends, stream, stream_text
from minigpt2.model import GPT2
from minigpt2.tokenizer import Tokenizer

__all__ = ["converse", "print_samples", "read_prompt"]


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The prompt: as it was given, or else the text of a file (- is standard input) or of standard input, in UTF-8 and
    without the newline at its end. None where nothing was given and a terminal is at both ends."""
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --file are both given; the prompt is one of them")
    if prompt is not None:
        return prompt
    if file is not None and str(file) != "-":
        name, data = str(file), file.read_bytes()
    elif file is None and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        return None
    else:
        name, data = "standard input", sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        return re.sub(r"\r?\n\Z", "", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text: {error}") from None


def print_samples(
    model: GPT2, tokenizer: Tokenizer, prompt: str, num: int, max_new_tokens: int, **sampling: Any
) -> None:
    """Print the prompt and a continuation, `num` times, each under a heading if there are several. An empty prompt
    begins a new document, as its end-of-text token does. `sampling` is that of `stream_text`."""
    ids = tokenizer.encode(prompt) or [tokenizer.separator]
    shown = "" if ids == [tokenizer.end_of_text] else prompt
    for i in range(1, num + 1):
        unprinted = f"--- sample {i} of {num} ---\n{shown}" if num > 1 else shown
        for text in stream_text(
            model, tokenizer, list(ids), max_new_tokens, **sampling
        ):  # an error stands on a line of its own
            print(unprinted + text, end="", flush=True)
            unprinted = ""
        print()


def converse(model: GPT2, tokenizer: Tokenizer, max_new_tokens: int, **sampling: Any) -> None:
    """Continue what is typed on the terminal, until Ctrl-D. The model sees all of the text so far, typed and its own,
    as far as its context reaches; after its end-of-text token a new text begins. Ctrl-C stops a continuation."""
    with suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited, and called back)
    stream(model, torch.zeros(1, 1, dtype=torch.long), max_new_tokens, **sampling)  # or raise what is wrong, at once
    print("Type a text for the model to continue; Enter alone lets it go on, Ctrl-D ends.", file=sys.stderr)
    context = model.config.n_positions
    room = max(1, context - max_new_tokens, context // 2)
    seen: list[int] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        ids = seen
        try:
            typed = tokenizer.encode(("\n" if seen else "") + line) if line else []
            ids = (seen + typed)[-room:] or [tokenizer.separator]
            for text in stream_text(model, tokenizer, ids, max_new_tokens, **sampling):
                print(text, end="", flush=True)
            seen = [] if ids[-1] in ends(model, tokenizer) else ids
        except KeyboardInterrupt:
            seen = ids
        except ValueError as error:
            print(f"minigpt2: {error}", file=sys.stderr)
            continue
        print()
