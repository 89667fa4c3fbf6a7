"""Imports go one way, from the foundations up to the programs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from tiny_runs import make_inputs

ROOT = Path(__file__).resolve().parents[1]

# From the bottom to the top: a module imports from the layers below its own and from its own folder.
LAYERS = [
    {"torch_private"},
    {"config", "command_line", "device", "extras", "files", "machine", "progress"},
    {"hub", "ops", "tokenizer", "checkpoint", "pretrained"},
    {"recompute", "loss", "inputs", "tokenizer_files", "run_folder"},
    {"data", "model"},
    {"weights", "generate", "memory"},
    {"evaluate", "parity", "console", "frontier"},
    {"pictures"},
    {"training"},
    {"bench"},
    {"__main__", "train"},
]
# Methods of GPT2 that call what is built on it, when they are called.
UPWARDS = {("pretrained", "weights"), ("pretrained", "generate")}
LEVEL = {room: level for level, layer in enumerate(LAYERS) for room in layer}


def imported(tree: ast.AST) -> set[str]:
    """The rooms of this package that a file imports from, anywhere but for annotations."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "minigpt2":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minigpt2."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("minigpt2.")}
        found |= imported(node)
    return found & LEVEL.keys()


def test_imports_go_one_way() -> None:
    package = ROOT / "minigpt2"
    files = {path: path.relative_to(package).parts[0].removesuffix(".py") for path in package.rglob("*.py")}
    files[ROOT / "train.py"] = "train"
    unknown = set(files.values()) - LEVEL.keys() - {"__init__"}
    assert not unknown, "give each new module its layer"
    for path, room in files.items():
        if room != "__init__":
            for other in imported(ast.parse(path.read_text(encoding="utf-8"))) - {room}:
                assert LEVEL[other] < LEVEL[room] or (room, other) in UPWARDS, f"{path} imports {other}"


def test_data_knows_nothing_of_the_model_and_the_model_nothing_of_training() -> None:
    for module, absent in (("minigpt2.data.batches", "minigpt2.model"), ("minigpt2.model", "minigpt2.training")):
        # The names of the package itself are not at issue.
        code = "import sys, types; package = sys.modules['minigpt2'] = types.ModuleType('minigpt2'); "
        code += f"package.__path__ = [{str(ROOT / 'minigpt2')!r}]; import {module}; print({absent!r} in sys.modules)"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_training_imports_no_compiler(tmp_path: Path) -> None:
    """Nor the computer algebra that comes with sharded tensors: 145 and 42 MiB, which no setting gives back."""
    for optimizer in ("adamw", "muon"):
        folder = tmp_path / optimizer
        folder.mkdir()
        run = [*make_inputs(folder), "--max-steps", "2", "--out", str(folder / "run")]
        code = "import sys, train; train.main(); print({'sympy', 'torch._dynamo'} & sys.modules.keys())"
        command = [sys.executable, "-c", code, *run, "--optimizer", optimizer]
        assert subprocess.check_output(command, text=True, cwd=ROOT).splitlines()[-1] == "set()"
