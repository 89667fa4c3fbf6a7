"""Compiles this package's C++ for this machine's processor at first use and loads it.

The library is cached; its name is a hash of everything that decides its content. Compiling takes a few seconds, needs
a C++20 compiler (`CXX`, else c++) and neither ninja nor setuptools. `torch.utils.cpp_extension` is passed over: its
`load` needs ninja, a killed process leaves its lock behind, and to import it is slow and may warn of a missing GPU.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CSRC = Path(__file__).parent / "csrc"
KERNEL = CSRC / "attention.cpp"
ALLOCATOR = CSRC / "allocator.cpp"


class Unavailable(Exception):
    """The kernel cannot be built or loaded here; the message says why."""


@functools.cache
def library(source: Path) -> ctypes.CDLL | str:
    """The library compiled from `source`, or the reason why there is none. The first use on a machine compiles it."""
    try:
        return _load(_built(source))
    except Unavailable as error:
        return str(error)


@functools.cache
def kernel() -> ctypes.CDLL | str:
    """The attention kernel with its functions declared, or the reason why there is none."""
    found = library(KERNEL)
    return found if isinstance(found, str) else _declared(found)


def cache_directory() -> Path:
    """Where compiled kernels are kept: under `TORCH_EXTENSIONS_DIR` if it is set, else under the user's cache."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "minigpt2"


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _command(source: Path, target: Path) -> list[str]:
    # -march=native does not exist on every compiler for ARM; -mcpu=native means the same there.
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [*_compiler(), "-std=c++20", "-O3", native, "-fPIC", "-shared", str(source), "-o", str(target)]
    # They are loaded already; linking to them by name shares the one thread pool and the one allocator.
    root = Path(torch.__file__).parent
    return [*command, f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]


def _processor() -> str:
    """What the processor can do, as -march=native sees it: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((x for x in lines if x.startswith(name)), "") for name in ("flags", "Features", "model name"))


def _compiler_version() -> str:
    compiler = _compiler()
    try:
        found = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise Unavailable(f"no C++ compiler: {compiler[0]!r} was not found (install g++, or set CXX)") from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"the C++ compiler {shlex.join(compiler)!r} does not run: {error}") from None
    return found.stdout


def _built(source: Path) -> Path:
    if sys.platform == "win32":
        raise Unavailable("it is built on Linux and macOS only")
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 10):
        raise Unavailable(f"it needs torch 2.10 or newer, this is {torch.__version__}")
    recipe = [source.read_text(), torch.__version__, _compiler_version(), *_command(source, Path()), _processor()]
    name = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:20]
    directory = cache_directory()
    library = directory / f"{source.stem}-{name}.so"
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / f"{source.stem}-{name}.lock"):
            if not library.exists():  # another process may have built it while this one waited
                _compile(source, library)
    except OSError as error:
        raise Unavailable(f"cannot write what was compiled to {directory}: {error}") from None
    return library


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that the system releases when its process ends, however it ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(source: Path, library: Path) -> None:
    unfinished = library.with_suffix(".unfinished")  # ours alone: the lock is held
    command = _command(source, unfinished)
    what = f"compiling {source.name} for this processor with {command[0]} (once)"
    print(f"minigpt2: {what} ... ", end="", flush=True, file=sys.stderr)
    start = time.perf_counter()
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        print("failed", file=sys.stderr, flush=True)
        unfinished.unlink(missing_ok=True)
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-1:]
        raise Unavailable(f"{command[0]} could not compile {source.name}: {(errors or ['no message'])[0].strip()}")
    unfinished.replace(library)
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def _load(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(f"the compiled {library.name} does not load: {error}") from None


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    integer, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    sizes: list[Any] = [ctypes.c_int, *[integer] * 4]  # dtype, B, T, H, D
    strided: list[Any] = [pointer, integer, integer]
    loaded.minigpt2_attention.argtypes = [*sizes, *strided, pointer, pointer, number, pointer]
    loaded.minigpt2_attention_backward.argtypes = [*sizes, *strided, *strided, *[pointer] * 3, number, pointer]
    loaded.minigpt2_dropout_add.argtypes = [ctypes.c_int, integer, integer, *[pointer] * 3, number, pointer]
    loaded.minigpt2_gelu.argtypes = [ctypes.c_int, integer, *[pointer] * 3]
    cached: list[Any] = [*strided, integer]
    loaded.minigpt2_decode.argtypes = [*sizes, *strided, *cached, *cached, pointer]
    loaded.minigpt2_few_rows.argtypes = [*[integer] * 3, pointer, integer, *[pointer] * 3]  # M, K, N, ...
    return loaded
