"""Building the kernel: in two processes at once, with a broken compiler, with none; and what a call may allocate."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

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
    print("fused")
except RuntimeError as error:
    print("RuntimeError:", error)
"""


def start(code, cache, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def test_two_processes_build_together_and_a_third_finds_it_built(tmp_path):
    both = [finish(p) for p in [start(AUTO, tmp_path), start(AUTO, tmp_path)]]
    assert [out for out, _ in both] == ["[]\nfused\n"] * 2
    lines = [line for _, err in both for line in err.splitlines() if "minigpt2" in line]
    assert len(lines) == 1
    assert "compiling" in lines[0]
    assert lines[0].endswith(" s")
    assert len(list(tmp_path.rglob("*.so"))) == 1
    assert not list(tmp_path.rglob("*.unfinished"))
    out, err = finish(start(AUTO, tmp_path))
    assert out == "[]\nfused\n"
    assert "minigpt2" not in err


def test_a_lock_and_a_half_written_library_left_by_a_killed_process_do_no_harm(tmp_path):
    code = "from minigpt2.ops import build, kernel; print(build._built('kernel', kernel._SOURCES))"
    library = Path(finish(start(code, tmp_path))[0].strip())
    library.rename(library.with_suffix(".unfinished"))
    library.with_suffix(".lock").touch()
    assert finish(start(AUTO, tmp_path))[0] == "[]\nfused\n"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 1", "does not run"),
        (
            'case "$*" in *--version*) echo fake 1.0;; *) echo "x.cpp:1: error: I am broken" >&2; exit 1;; esac',
            "I am broken",
        ),
    ],
)
def test_a_broken_compiler(script, why, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    out, _ = finish(start(AUTO, tmp_path / "cache", CXX=str(compiler)))
    warned, raised = out.splitlines()
    assert why in warned
    assert warned.count("attention takes the slower") == 1
    assert raised.startswith("RuntimeError")
    assert why in raised


@pytest.mark.parametrize("environment", [{"CXX": "no-such-compiler"}, {"CXX": "", "PATH": "/nowhere"}])
def test_no_compiler(environment, tmp_path):
    out, _ = finish(start(AUTO, tmp_path, **environment))
    warned, raised = out.splitlines()
    assert "no C++ compiler" in warned
    assert "no C++ compiler" in raised


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    out, _ = finish(start(AUTO, tmp_path / "file"))
    assert "cannot write" in out
    assert "RuntimeError" in out


def test_nothing_heavy_at_import(tmp_path):
    heavy = "('triton', 'torch.utils.cpp_extension')"
    code = f"import sys, minigpt2.ops.attention; print([m for m in {heavy} if m in sys.modules])"
    out, _ = finish(start(code, tmp_path, CXX="no-such-compiler"))
    assert out == "[]\n"
    assert not list(tmp_path.iterdir())


MEMORY = """
import re, torch
from pathlib import Path
from minigpt2.ops.attention import attention
H, D, T, dtype = 2, 64, {T}, torch.{dtype}
torch.set_num_threads(2)
def peak():
    # Not ru_maxrss, in which a child process inherits the peak of its parent.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
small = torch.randn(1, 64, 3 * H * D).to(dtype).requires_grad_()
warm = attention(small, H, dropout_p=0.1, backend="fused")
warm.backward(torch.ones_like(warm))  # loads what a first call loads: with a gradient given, torch imports sympy
before = peak()
qkv = torch.ones(1, T, 3 * H * D, dtype=dtype, requires_grad=True)
grad = torch.ones(1, T, H * D, dtype=dtype)
out = attention(qkv, H, dropout_p=0.1, backend="fused")
out.backward(grad)
own = sum(x.numel() * x.element_size() for x in (qkv, grad, out, qkv.grad))
print((peak() - before) / own)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux reports it")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beyond_inputs_and_outputs(dtype):
    """67 MB of tensors (33 in bfloat16) at T = 16384: one row of probabilities a thread would show."""
    process = subprocess.run(
        [sys.executable, "-c", MEMORY.format(T=16384, dtype=dtype)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) <= 1.1
