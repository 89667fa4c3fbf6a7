"""bfloat16 is multiplied as bfloat16 on some processors and as float32 on the others: both are tested on the first."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt2.ops import build

ROOT = Path(__file__).resolve().parents[3]

DIGEST = """
import hashlib, torch
from minigpt2.ops import kernel
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


@pytest.mark.slow
@pytest.mark.usefixtures("needs_the_kernel")
def test_without_the_processors_bfloat16_products(tmp_path):
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx512_bf16" not in cpuinfo.read_text(encoding="utf-8"):
        pytest.skip("this processor has none, and all tests run without")
    without = {"CXX": shlex.join([*build.compiler(), "-U__AVX512BF16__"]), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    ours, others = run("-c", DIGEST).split(), run("-c", DIGEST, **without).split()
    assert ours[0] == others[0]
    assert ours[1] != others[1]
    tests = "tests/ops/attention/test_fused_accuracy.py"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", "cpu and bfloat16 and not extreme", **without)
