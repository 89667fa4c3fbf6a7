"""Building compiled code: where it is kept, by which compiler, by two processes at once; what is said where it fails.

Most is tried with a library of one function, which compiles in no time.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt2.ops import build

ROOT = Path(__file__).resolve().parents[2]
TINY = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }'

pytestmark = pytest.mark.usefixtures("needs_the_kernel")


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a library to be built, for one test, with a cache beside it and a place for temporary files."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "tiny.cpp").write_text(TINY)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(build, "CSRC", folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    yield folder
    forget()


def forget() -> None:
    """What was built and chosen before."""
    build.library.cache_clear()
    build._compiler_and_version.cache_clear()


def answer() -> int | str:
    """That of the library, or why there is none; as if it were the first call of a process."""
    forget()
    found = build.library("tiny", ("tiny.cpp",))
    return found if isinstance(found, str) else found.answer()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def libraries(folder: Path) -> list[Path]:
    return list(folder.rglob("*.so"))


def test_it_is_compiled_once_and_again_when_the_source_changes(csrc: Path, tmp_path: Path, capfd) -> None:
    assert answer() == 42
    said = capfd.readouterr().err
    assert said.startswith("minigpt2: compiling the tiny for this processor with ")
    assert said.endswith(" s\n")
    assert answer() == 42
    assert capfd.readouterr().err == ""
    (csrc / "tiny.cpp").write_text(TINY.replace("42", "43"))
    assert answer() == 43
    assert len(libraries(tmp_path / "cache")) == 2
    assert not list(tmp_path.rglob("unfinished*"))


@pytest.mark.slow
def test_two_processes_compile_it_once(csrc: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from minigpt2.ops import build
build.CSRC = Path({str(csrc)!r})
print(build.library("tiny", ("tiny.cpp",)).answer())
"""
    log = tmp_path / "log"
    slow = script(tmp_path / "slow", f'case "$*" in *--version*) ;; *) echo >>"{log}"; sleep 1;; esac; exec c++ "$@"')
    environment = {**os.environ, "CXX": str(slow), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=100)[0] for process in both] == ["42\n", "42\n"]
    assert log.read_text() == "\n"


def test_what_a_killed_process_left_does_no_harm(csrc: Path, tmp_path: Path) -> None:
    assert answer() == 42
    (library,) = libraries(tmp_path / "cache")
    library.unlink()
    library.with_suffix(".lock").touch()
    (library.parent / "unfinished-x").mkdir()
    (library.parent / "unfinished-x" / library.name).write_bytes(b"\x7fELF")
    assert answer() == 42


@pytest.mark.parametrize("lacks", ["fcntl", "locks"])
def test_without_locks(csrc: Path, lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    if lacks == "fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:

        def refuse(*arguments: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    assert answer() == 42


@pytest.mark.parametrize("name", ["with a space", "größer 大きい", 'quote\'d "$HOME"'])
def test_paths_of_any_characters(csrc: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / name
    csrc.rename(folder)
    compiler = script(tmp_path / f"{name} c++", 'exec c++ "$@"')
    monkeypatch.setattr(build, "CSRC", folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / f"{name} cache"))
    monkeypatch.setenv("CXX", str(compiler))
    assert answer() == 42
    assert build.compiler() == (str(compiler),)
    assert libraries(tmp_path / f"{name} cache")


def test_a_command_with_options(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (csrc / "tiny.cpp").write_text(TINY.replace("42", "ANSWER"))
    monkeypatch.setenv("CXX", "c++ -D 'ANSWER=40 + 1'")
    assert answer() == 41


def test_a_cache_that_cannot_be_written_is_replaced_by_one_of_this_user(csrc: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # in the way of the folder: root may write where nobody else may
    assert answer() == 42
    (library,) = libraries(tmp_path / "temporary")
    assert library.parent.stat().st_mode & 0o077 == 0
    library.parent.chmod(0o777)
    reason = str(answer())
    assert reason.startswith("there is no place for what is compiled: ")
    assert str(tmp_path / "cache") in reason
    assert reason.endswith(f"{library.parent} is not this user's alone")


def test_a_library_that_does_not_load_is_passed_over(
    csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system from which nothing may be run."""
    assert answer() == 42
    (library,) = libraries(tmp_path / "cache")
    empty = tmp_path / "other" / "minigpt2" / library.name
    empty.parent.mkdir(parents=True)
    empty.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "other"))
    assert answer() == 42
    assert [path.name for path in libraries(tmp_path / "temporary")] == [library.name]


def test_no_home_and_no_temporary_files(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", none)
    assert answer() == 42
    (tmp_path / "temporary").rename(tmp_path / "gone")
    reason = str(answer())
    assert reason.startswith("there is no place for what is compiled: Could not determine home directory.; ")
    assert str(tmp_path / "temporary") in reason


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exit 3", "it ends in status 3"),
        ('case "$*" in *--version*) echo fake 1.0;; *) echo "x.cpp:1: error: I am bad" >&2; exit 1;; esac', "I am bad"),
        ('case "$*" in *--version*) echo fake 1.0;; *) exit 1;; esac', "no message"),
    ],
)
def test_a_broken_compiler(csrc: Path, text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path / "broken", text)))
    reason = str(answer())
    assert why in reason
    assert "broken" in reason
    assert "\n" not in reason


@pytest.mark.parametrize("chosen", ["no-such-compiler", "'one quotation mark"])
def test_a_compiler_that_is_not_there(csrc: Path, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", chosen)
    reason = str(answer())
    assert reason.startswith("no C++ compiler: ")
    assert chosen in reason


def test_which_compiler_is_chosen(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CXX, c++, g++, clang++, ziglang; one that does not run, such as the one that macOS has until its tools are
    installed, is passed over."""
    real = shutil.which("c++")
    tools, packages = tmp_path / "tools", tmp_path / "packages"
    tools.mkdir()
    (packages / "ziglang").mkdir(parents=True)
    path = f"PATH={os.environ['PATH']!r}"
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert answer() == "no C++ compiler was found: install g++ or clang, or pip install 'minigpt2[compiler]'"

    (packages / "ziglang" / "__main__.py").write_text(f"""
import os, sys
{path}
assert sys.argv[1] == "c++"
os.environ["PATH"] = PATH
os.execv({real!r}, [{real!r}, *sys.argv[2:]])
""")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: name == "ziglang" or None)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    assert answer() == 42
    assert build.compiler() == (sys.executable, "-m", "ziglang", "c++")
    assert build.explain_compiler().startswith(f"{sys.executable} -m ziglang c++, ")

    script(tools / "c++", "exit 1")
    for name in ("clang++", "g++"):
        script(tools / name, f'{path} exec {real} "$@"')
        assert answer() == 42
        assert build.compiler() == (name,)
        assert build.explain_compiler().startswith(name)
    monkeypatch.setenv("CXX", str(tools / "clang++"))
    forget()
    assert build.compiler() == (str(tools / "clang++"),)


AUTO = """
import torch, warnings
from minigpt2.ops.attention import attention
qkv = torch.randn(1, 8, 96)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = attention(qkv, 2)
    attention(qkv, 2)
assert torch.allclose(out, attention(qkv, 2, backend="eager"), atol=1e-5)
print([str(w.message) for w in caught])
try:
    attention(qkv, 2, backend="fused")
except RuntimeError as error:
    print("RuntimeError:", error)
"""


def run(code: str, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_without_a_compiler_attention_says_so_once(tmp_path: Path) -> None:
    warned, raised = run(AUTO, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path)).splitlines()
    assert warned.count("attention takes the slower sdpa path: no C++ compiler: 'no-such-compiler'") == 1
    assert raised.startswith("RuntimeError: fused attention is not available: no C++ compiler")


def test_nothing_heavy_at_import(tmp_path: Path) -> None:
    heavy = "('triton', 'torch.utils.cpp_extension', 'fcntl')"
    code = "import sys, torch; before = set(sys.modules); import minigpt2.ops.attention; "
    code += f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    assert run(code, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path)) == "[]\n"
    assert not list(tmp_path.iterdir())
