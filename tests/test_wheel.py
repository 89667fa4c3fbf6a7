"""What `pip wheel .` makes: the package with all that it needs, and train.py as one of its verbs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as an installer lays them."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def minigpt2(site: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The command line of the unpacked wheel, with this environment's packages and nothing of this checkout."""
    paths = os.pathsep.join([str(site), sysconfig.get_path("purelib")])  # without its .pth files, by -S
    command = [sys.executable, "-S", "-m", "minigpt2", *map(str, words)]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, cwd=site.parent, capture_output=True, text=True
    )


def test_it_holds_the_package_and_no_more(unpacked: Path) -> None:
    package = {path.relative_to(ROOT) for path in (ROOT / "minigpt2").rglob("*") if path.is_file()}
    package = {path for path in package if "__pycache__" not in path.parts}
    found = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in found if path.parts[0] == "minigpt2"} == package | {Path("minigpt2/_train.py")}
    assert {path.parts[0] for path in found if path.parts[0] != "minigpt2"} == {"minigpt2-0.1.0.dist-info"}
    assert (unpacked / "minigpt2" / "_train.py").read_bytes() == (ROOT / "train.py").read_bytes()


def test_it_trains(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 200)
    shape = ["--n-layer", 1, "--n-head", 1, "--n-embd", 16, "--length", 16, "--batch", 2]
    short = ["--max-steps", 1, "--eval-batches", 1, "--data", tmp_path / "text.txt", "--out", tmp_path / "run"]
    done = minigpt2(unpacked, "train", *shape, *short)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
    again = minigpt2(unpacked, "train", *shape, *short)
    assert again.returncode == 2
    assert again.stderr.startswith(f"minigpt2 train: --out {tmp_path / 'run'} already holds a run")
