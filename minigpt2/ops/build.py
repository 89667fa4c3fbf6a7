"""Compiles this package's C++ for this machine's processor at first use and loads it.

The library is cached; its name is a hash of everything that decides its content. Compiling takes a few seconds, and
needs a C++20 compiler and neither ninja nor setuptools. `torch.utils.cpp_extension` is passed over: its `load` needs
ninja, a killed process leaves its lock behind, and to import it is slow and may warn of a missing GPU.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

CSRC = Path(__file__).parent / "csrc"


class Unavailable(Exception):
    """The library cannot be built or loaded here; the message says why."""


@functools.cache
def library(name: str, sources: tuple[str, ...]) -> ctypes.CDLL | str:
    """The library `name` compiled from files of csrc/, or the reason why there is none. The first use on a machine
    compiles it."""
    try:
        return _loaded(name, sources)
    except Unavailable as error:
        return str(error)


def user_cache() -> Path:
    """Where compiled libraries are kept: under `TORCH_EXTENSIONS_DIR` if it is set, else under the user's cache. Raises
    RuntimeError if the user has no home."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "minigpt2"


def temporary_cache() -> Path:
    """Where they are kept if not there: in a folder of this user's for temporary files."""
    user = os.getuid()
    directory = Path(tempfile.gettempdir()) / f"minigpt2-{user}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    # What lies there is loaded and run: nobody else may put it there.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user or status.st_mode & 0o022:
        raise OSError(f"{directory} is not this user's alone")
    return directory


def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: `CXX`, else the first that runs of c++, g++, clang++ and the one of the PyPI
    package ziglang. Raises Unavailable if there is none."""
    return _compiler_and_version()[0]


def explain_compiler() -> str:
    """The compiler's command and version, in a line. Raises Unavailable if there is none."""
    command, version = _compiler_and_version()
    name, line = shlex.join(command), version.strip().partition("\n")[0]
    return line if line.startswith(f"{name} ") else f"{name}, {line}"


@functools.cache
def _compiler_and_version() -> tuple[tuple[str, ...], str]:
    if chosen := os.environ.get("CXX", "").strip():
        try:
            # A path may have spaces in it, and a command words after it.
            command = (chosen,) if shutil.which(chosen) else tuple(shlex.split(chosen))
        except ValueError as error:
            raise Unavailable(f"no C++ compiler: CXX is {chosen!r}, with {error}") from None
        return command, _version(command)
    commands: list[tuple[str, ...]] = [(name,) for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if importlib.util.find_spec("ziglang"):
        commands.append((sys.executable, "-m", "ziglang", "c++"))
    reason = "no C++ compiler was found: install g++ or clang, or pip install 'minigpt2[compiler]'"
    for command in commands:
        try:
            return command, _version(command)
        except Unavailable as error:
            reason = str(error)
    raise Unavailable(reason)


def _version(command: tuple[str, ...]) -> str:
    try:
        result = _run([*command, "--version"])
    except FileNotFoundError:
        raise Unavailable(f"no C++ compiler: {command[0]!r} was not found (install g++, or set CXX)") from None
    except OSError as error:
        raise Unavailable(f"the C++ compiler {shlex.join(command)!r} does not run: {error}") from None
    if result.returncode:
        why = f"with --version it ends in status {result.returncode}"
        raise Unavailable(f"the C++ compiler {shlex.join(command)!r} does not run: {why}")
    return result.stdout


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a compiler, with messages in English."""
    environment = {**environment, **os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, check=False, capture_output=True, env=environment, encoding="utf-8", errors="replace"
    )


def _flags() -> list[str]:
    # -march=native does not exist on every compiler for ARM; -mcpu=native means the same there.
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return ["-std=c++20", "-O3", native, "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread", "-shared"]


def _processor() -> str:
    """What the processor can do, as -march=native sees it: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((x for x in lines if x.startswith(name)), "") for name in ("flags", "Features", "model name"))


def _loaded(name: str, sources: tuple[str, ...]) -> ctypes.CDLL:
    if sys.platform == "win32":
        raise Unavailable("it is built on Linux and macOS only")
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 10):
        raise Unavailable(f"it needs torch 2.10 or newer, this is {torch.__version__}")
    texts = [path.read_text(encoding="utf-8") for path in sorted(CSRC.iterdir())]
    command, version = _compiler_and_version()
    recipe = [*sources, *texts, torch.__version__, *command, version, *_flags(), _processor()]
    file = f"{name}-{hashlib.sha256(chr(0).join(recipe).encode()).hexdigest()[:20]}.so"
    problems = []
    for cache in (user_cache, temporary_cache):
        try:
            library = cache() / file
            if not library.exists():
                library.parent.mkdir(parents=True, exist_ok=True)
                with _locked(library.with_suffix(".lock")):
                    if not library.exists():  # another process may have built it while this one waited
                        _compile(name, sources, library)
            return ctypes.CDLL(str(library))
        except (OSError, RuntimeError) as error:  # read-only, not to be run from, or there is no home
            problems.append(str(error))
    raise Unavailable(f"there is no place for what is compiled: {'; '.join(problems)}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from compiling the same. The system takes the lock back when a process ends, however it
    ends. Where there are no locks, two may compile, which costs time only."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # which Windows lacks

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(name: str, sources: tuple[str, ...], library: Path) -> None:
    command, root = compiler(), Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=library.parent) as folder:
        what = f"compiling the {name} for this processor with {shlex.join(command)} (once)"
        print(f"minigpt2: {what} ... ", end="", flush=True, file=sys.stderr)
        start, unfinished = time.perf_counter(), Path(folder, library.name)
        files = [*(str(CSRC / source) for source in sources), "-o", str(unfinished)]
        # They are loaded already; linking to them by name shares the one thread pool and the one allocator.
        pytorch = [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        result = _run([*command, *_flags(), *files, *pytorch], ZIG_GLOBAL_CACHE_DIR=folder, ZIG_LOCAL_CACHE_DIR=folder)
        if result.returncode:
            print("failed", file=sys.stderr, flush=True)
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-1:]
            raise Unavailable(f"{command[0]} could not compile the {name}: {(errors or ['no message'])[0].strip()}")
        unfinished.replace(library)
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
