"""What a call of the fused kernel allocates beyond its inputs and outputs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

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
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_memory_beyond_inputs_and_outputs(dtype):
    """67 MB of tensors (33 in bfloat16) at T = 16384: one row of probabilities a thread would show."""
    command = [sys.executable, "-c", MEMORY.format(T=16384, dtype=dtype)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) <= 1.1
