"""The documents: blocks of Python run, command lines are what their programs take, and figures are right."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from minigpt2 import GPT2, GPT2Config, weights
from minigpt2 import __main__ as cli
from minigpt2.memory import footprint
from minigpt2.model import Block
from minigpt2.recompute import RECOMPUTE
from minigpt2.tokenizer import get_tokenizer
from minigpt2.training.settings import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "runs", "node_modules"} & set(path.parts))
TOUR = (ROOT / "minigpt2" / "README.md").read_text(encoding="utf-8")


def blocks() -> Iterator[Any]:
    """Each block of Python, by page and number."""
    for page in PAGES:
        found = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for number, code in enumerate(found):
            yield pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")


def command_lines() -> Iterator[Any]:
    """Each command, by page: the indented lines of a page, and what stands between backquotes and looks like one."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"^```python\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`]+)`", text)
        for line in dict.fromkeys(" ".join(line.split()) for line in lines):
            for part in re.split(r"\s*(?:&&|\|)\s*", line.split("  #")[0].split("<")[0]):
                words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
                if len(words) > 1 and program(words):
                    yield pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}")


def program(words: list[str]) -> list[str] | None:
    """What `minigpt2` would be given by a command line, or None if it is not one of minigpt2."""
    if words[0] == "torchrun":
        words = words[words.index("--nproc-per-node") + 2 :] if "--nproc-per-node" in words else words[1:]
        return ["train", *words[1:]] if words[:1] == ["train.py"] else words[2:] if words[:1] == ["-m"] else None
    if words[:2] == ["python", "train.py"] or (words[0] == "train.py" and words[1].startswith("--")):
        return ["train", *words[words.index("train.py") + 1 :]]
    return words[1:] if words[0] == "minigpt2" else None


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GPT2:
    """The current folder, in which `weights/gpt2` is a narrow model with as many blocks and tokens as the real one."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=12, n_head=12, n_embd=192, embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5)
    model = GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path / "weights" / "gpt2", get_tokenizer())
    monkeypatch.setattr(weights, "weights_root", lambda: tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    return model


@pytest.mark.parametrize("code", list(blocks()))
def test_python_runs(code: str, stand_in: GPT2) -> None:
    if "import peft" in code:
        pytest.importorskip("peft")
    names: dict[str, object] = {}
    exec(compile(code, "<document>", "exec"), names)
    check = CHECKS.get(next((name for name in CHECKS if name in names), ""))
    if check:
        check(names, stand_in)


def check_ten_lines(names: dict[str, object], model: GPT2) -> None:
    """They are GPT-2."""
    ids = torch.randint(50257, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = model(ids)
    found = names["gpt2"](ids, model.state_dict())  # type: ignore[operator]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def check_use(names: dict[str, object], _: GPT2) -> None:
    """The cache gives the logits of the last tokens, which dropout would change."""
    logits, last = names["logits"], names["last"]
    assert isinstance(logits, torch.Tensor) and isinstance(last, torch.Tensor)  # noqa: PT018
    torch.testing.assert_close(last, logits[:, -last.size(1) :], rtol=1e-4, atol=1e-4)
    assert (Path("my-gpt2") / "model.safetensors").exists()


CHECKS = {"gpt2": check_ten_lines, "cache": check_use}


@pytest.mark.parametrize("words", list(command_lines()))
def test_commands_are_what_the_parser_takes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that need a network, a GPU, hours or files are read by the parser of their program and not run."""
    arguments = program(words)
    assert arguments
    if arguments[0] == "train":
        if "--help" not in arguments:
            tyro.cli(TrainConfig, args=arguments[1:])
        return
    called: list[object] = []
    # All verbs are parsed as they are, and what would then be called is not.
    monkeypatch.setattr(cli, "parsed", lambda parse: lambda: called.append(parse()))
    monkeypatch.setattr(sys, "argv", ["minigpt2", *arguments])
    if arguments[-1] == "--help" or len(arguments) == 1:  # a verb that is spoken of
        assert arguments[0] in cli.VERBS
        return
    assert cli.main() == 0
    assert called


def table(heading: str) -> list[list[str]]:
    """The rows of the table of the tour that has a column of this name, without the first two."""
    lines = TOUR[TOUR.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_parameters_of_each_step() -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    found = 0
    *steps, total = table("step")
    assert int(total[-1]) == sum(p.numel() for p in model.parameters())
    for _, name, shape, count in steps:
        names = re.findall(r"`([a-z_0-9.]+)`", name)
        parameters = int(count)
        found += 0 if shape == "(B, T, 50257)" or "h.0" in names else parameters * (12 if _.startswith("- ") else 1)
        if not names or shape == "(B, T, 50257)":
            assert parameters == 0
            continue
        module = model.get_submodule(names[0] if names[0] in ("wte", "wpe", "ln_f", "h.0") else f"h.0.{names[0]}")
        assert parameters == sum(p.numel() for p in module.parameters()), name
    assert found == int(total[-1])


def saved(block: Block, recompute: str) -> list[int]:
    """The bytes of each tensor that autograd keeps of a run of the block on 4 x 1024 tokens, largest first."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in mine and tensor.nbytes > 1024:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mine = {p.data_ptr() for p in block.parameters()}
    x = torch.randn(4, 1024, 768, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(x)
    assert y.shape == x.shape
    return sorted(kept.values(), reverse=True)


def test_what_a_block_keeps() -> None:
    """The table of the tour, against what autograd keeps of a block, and against the sums of memory.py."""
    *rows, total = table("kept tensor")
    sizes = [int(row[2]) for row in rows]
    pairs = [n // 2 for row, n in zip(rows, sizes, strict=True) if row[1].startswith("2 x") for _ in range(2)]
    singles = [n for row, n in zip(rows, sizes, strict=True) if not row[1].startswith("2 x")]
    torch.manual_seed(0)
    assert saved(Block(GPT2Config(), 0, "auto").train(), "block") == sorted(singles + pairs, reverse=True)
    kept = {name: int(total[column]) for name, column in zip(RECOMPUTE, (2, 3, 4), strict=True)}
    assert sum(sizes) == kept["block"]
    assert sum(n for row, n in zip(rows, sizes, strict=True) if row[3] == "yes") == kept["keep-attention"]
    assert sum(n for row, n in zip(rows, sizes, strict=True) if row[4].startswith(("yes", "as"))) == kept["pointwise"]
    config, seeds = GPT2Config(), 6000  # what a checkpoint keeps of the random number generator, a block

    def held(k: int, recompute: str = "block") -> int:
        return footprint(config, 4, 1024, checkpoint_every=k, recompute=recompute).activations

    assert held(0) == held(1) + 11 * kept["block"] - 11 * (rows_of_stream := int(rows[0][2])) - 11 * 5056
    assert held(1, "keep-attention") - held(1) == 11 * kept["keep-attention"]
    assert held(0) - held(0, "pointwise") == pytest.approx(12 * (kept["block"] - kept["pointwise"]), abs=12 * seeds)
    assert rows_of_stream == 4 * 1024 * 768 * 4


def test_what_is_held_at_each_notch() -> None:
    for k, again, held in table("`checkpoint_every`"):
        assert footprint(GPT2Config(), 4, 1024, checkpoint_every=int(k)).activations == int(held)
        assert int(again) == (12 - int(k) if int(k) else 0)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_files_of_the_package_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "minigpt2").rglob("*.py")}
    assert {path.name: n for path, n in lengths.items() if n > 400} == {}
    assert lengths[ROOT / "minigpt2" / "model.py"] <= 220  # what a reader opens first
    assert lengths[ROOT / "minigpt2" / "ops" / "attention" / "steps.py"] <= 150
