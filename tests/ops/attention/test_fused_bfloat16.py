"""bfloat16 is multiplied as bfloat16 on some processors and as float32 on the others: on the first both are tested, and
where they have two ways to multiply it, those."""

import ctypes
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt2.ops import build, kernel

ROOT = Path(__file__).resolve().parents[3]

DIGEST = """
import hashlib, torch
from minigpt2.ops import kernel
print(kernel.bfloat16_products())
qkv = torch.randn(1, 100, 3 * 64, generator=torch.Generator().manual_seed(0))
for dtype in (torch.float32, torch.bfloat16):
    out, lse = kernel.attention(qkv.to(dtype), 1, 0.0, None)
    grad = kernel.attention_backward(torch.ones_like(out), qkv.to(dtype), out, lse, 1, 0.0, None)
    print(hashlib.sha256(bytes(torch.cat([out, grad], -1).view(torch.uint8).flatten().tolist())).hexdigest())
"""


def run(*arguments: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.usefixtures("needs_the_kernel")
def test_the_best_unit_of_the_processor_is_used():
    compiler = subprocess.run(
        [*build.compiler(), "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    if compiler.returncode:
        pytest.skip(f"the compiler does not say what it knows: {compiler.stderr}")
    names = ("__AVX512BF16__", "__AMX_BF16__", "__AMX_TILE__")
    pairs, *tiles = (f"#define {name} 1" in compiler.stdout for name in names)
    best = "avx512_bf16" if pairs else "float32"
    if pairs and all(tiles) and sys.platform == "linux" and not ctypes.CDLL(None).syscall(158, 0x1023, 18):
        best = "amx_bf16"  # the system grants its use to those that ask, as this test has
    assert kernel.bfloat16_products() == best


@pytest.mark.slow
@pytest.mark.parametrize(("left", "macro"), [("float32", "__AVX512BF16__"), ("avx512_bf16", "__AMX_BF16__")])
@pytest.mark.usefixtures("needs_the_kernel")
def test_without_the_processors_bfloat16_products(tmp_path, left, macro):
    ours = run("-c", DIGEST).split()
    if ours[0] in (left, "float32"):
        pytest.skip("this processor has no better ones, and all tests run without")
    without = {"CXX": shlex.join([*build.compiler(), f"-U{macro}"]), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    others = run("-c", DIGEST, **without).split()
    assert others[0] == left
    assert ours[1] == others[1]
    assert ours[2] != others[2]
    tests = "tests/ops/attention/test_fused_accuracy.py"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", "cpu and bfloat16 and not extreme", **without)
