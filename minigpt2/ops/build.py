"""Compiles this package's C++ for this machine's processor at first use and loads it.

The library is cached; its name is a hash of everything that decides its content. Compiling takes a few seconds, needs
a C++20 compiler and neither ninja nor setuptools. `torch.utils.cpp_extension` is passed over: its
`load` needs ninja, a killed process leaves its lock behind, and to import it is slow and may warn of a missing GPU.
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
        return _load(_built(name, sources))
    except Unavailable as error:
        return str(error)


def cache_directory() -> Path:
    """Where compiled libraries are kept: under `TORCH_EXTENSIONS_DIR` if it is set, else under the user's cache; where
    there can be none, in a folder of this user's for temporary files."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root).expanduser() / "minigpt2"
    try:
        directory = Path.home() / ".cache" / "minigpt2"
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError):  # a home that cannot be written to, or none
        pass
    user = os.getuid() if hasattr(os, "getuid") else ""
    directory = Path(tempfile.gettempdir()) / f"minigpt2-{user}"
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, exist_ok=True)
    # What lies there is loaded and run: it must be nobody else's.
    if user != "" and (not directory.is_dir() or directory.stat().st_uid != user):
        raise Unavailable(f"{directory} belongs to another user; set TORCH_EXTENSIONS_DIR to a folder of yours")
    return directory


@functools.cache
def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: `CXX`, else the first that is here of c++, g++, clang++ and the one of the PyPI
    package ziglang. Raises Unavailable if there is none."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return tuple(chosen)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return (name,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    raise Unavailable("no C++ compiler was found: install g++ or clang, or pip install 'minigpt2[compiler]'")


def _command(sources: tuple[str, ...], target: Path) -> list[str]:
    # -march=native does not exist on every compiler for ARM; -mcpu=native means the same there.
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [*compiler(), "-std=c++20", "-O3", native, "-fPIC", "-shared", *(str(CSRC / name) for name in sources)]
    # They are loaded already; linking to them by name shares the one thread pool and the one allocator.
    root = Path(torch.__file__).parent
    return [*command, "-o", str(target), f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]


def _processor() -> str:
    """What the processor can do, as -march=native sees it: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((x for x in lines if x.startswith(name)), "") for name in ("flags", "Features", "model name"))


def _compiler_version() -> str:
    command = compiler()
    try:
        found = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise Unavailable(f"no C++ compiler: {command[0]!r} was not found (install g++, or set CXX)") from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"the C++ compiler {shlex.join(command)!r} does not run: {error}") from None
    return found.stdout


def _built(name: str, sources: tuple[str, ...]) -> Path:
    if sys.platform == "win32":
        raise Unavailable("it is built on Linux and macOS only")
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 10):
        raise Unavailable(f"it needs torch 2.10 or newer, this is {torch.__version__}")
    texts = [path.read_text(encoding="utf-8") for path in sorted(CSRC.iterdir())]
    recipe = [*texts, torch.__version__, _compiler_version(), *_command(sources, Path()), _processor()]
    stem = f"{name}-{hashlib.sha256(chr(0).join(recipe).encode()).hexdigest()[:20]}"
    directory = cache_directory()
    library = directory / f"{stem}.so"
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / f"{stem}.lock"):
            if not library.exists():  # another process may have built it while this one waited
                _compile(name, sources, library)
    except OSError as error:
        raise Unavailable(f"cannot write what was compiled to {directory}: {error}") from None
    return library


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when its process ends, however it ends."""
    try:
        import fcntl
    except ImportError:
        raise Unavailable("building it needs the module fcntl, which this Python lacks") from None
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(name: str, sources: tuple[str, ...], library: Path) -> None:
    unfinished = library.with_suffix(".unfinished")  # ours alone: the lock is held
    command = _command(sources, unfinished)
    what = f"compiling the {name} for this processor with {shlex.join(compiler())} (once)"
    print(f"minigpt2: {what} ... ", end="", flush=True, file=sys.stderr)
    start = time.perf_counter()
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        print("failed", file=sys.stderr, flush=True)
        unfinished.unlink(missing_ok=True)
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-1:]
        raise Unavailable(f"{compiler()[0]} could not compile the {name}: {(errors or ['no message'])[0].strip()}")
    unfinished.replace(library)
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def _load(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(f"the compiled {library.name} does not load: {error}") from None
