"""What is particular to the Triton kernels. The other files here run them too: see implementations.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from implementations import SEED, no_interpreter, operation
from torch import nn
from torch.utils.checkpoint import checkpoint

from minigpt2.ops.attention import attention, explain_backend, resolve_backend
from minigpt2.ops.attention.fused import dropout_mask, unavailable

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def interpreted():
    return operation("interpreter")


def relative_error(x, reference):
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def every_choice_of_tiles():
    if (reason := no_interpreter()) is not None:
        pytest.skip(reason)
    from minigpt2.ops.attention import gpu

    for (kernel, itemsize, width), choices in gpu.TILES.items():
        for tiles in choices * (kernel != "delta"):  # of which there is one, that all take
            yield kernel, torch.float32 if itemsize == 4 else torch.bfloat16, width, tiles


@pytest.mark.slow
def test_every_choice_of_tiles_gives_the_same_result(interpreted):
    """Up to rounding; and the mask of dropout is the same in all, or results would have nothing in common."""
    from minigpt2.ops.attention import gpu

    T, H, p, seed = 100, 1, 0.3, torch.tensor(SEED)
    for kernel, dtype, D, tiles in every_choice_of_tiles():
        torch.manual_seed(0)
        qkv, grad = torch.randn(1, T, 3 * D).to(dtype), torch.randn(1, T, D).to(dtype)
        exact = torch.ops.minigpt2.attention(qkv.double(), H, p, seed)
        bound = 1e-6 if dtype == torch.float32 else 1e-2
        if kernel == "forward":
            out, lse = gpu.forward(qkv, H, p, seed, tiles=tiles)
            assert relative_error(out, exact[0]) < bound, tiles
            assert relative_error(lse, exact[1]) < bound, tiles
        else:
            arguments = grad.double(), qkv.double(), *exact, H, p, seed
            expected = torch.ops.minigpt2.attention_backward(*arguments)
            others = gpu.tiles_for("queries", dtype, D)[0], gpu.tiles_for("keys", dtype, D)[0]
            both = (tiles, others[1]) if kernel == "queries" else (others[0], tiles)
            out, lse = exact[0].to(dtype), exact[1].float()
            found = gpu.backward(grad, qkv, out, lse, H, p, seed, tiles=both)
            for part in range(3):
                a, b = found.chunk(3, -1)[part], expected.chunk(3, -1)[part]
                assert relative_error(a, b) < bound, (kernel, tiles, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_agrees_with_the_cpp_kernel_from_the_same_seed(interpreted, dtype):
    torch.manual_seed(0)
    grad = torch.randn(2, 100, 128).to(dtype)
    results = []
    for op in (interpreted, operation("cpu")):
        qkv = torch.randn(2, 100, 3 * 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out, lse = op(qkv, 2, 0.2, 12345)
        out.backward(grad)
        results.append((out.detach(), lse, qkv.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_a_run_repeats_bit_for_bit(interpreted):
    """Each result has one writer, so the gradient's memory needs no zeros to start from."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 100, 3 * 64)
    runs = []
    for _ in range(2):
        x = qkv.clone().requires_grad_()
        out, _ = interpreted(x, 1, 0.1)
        out.sum().backward()
        runs.append((out.detach(), x.grad))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_bfloat16_is_rounded_in_the_interpreter_as_torch_does(interpreted):
    """That the repair in implementations.py took: attention to one key is that key's value, rounded once."""
    v = torch.randn(1, 1, 64).to(torch.bfloat16)
    out, _ = interpreted(torch.cat([v, v, v], -1), 1)
    assert torch.equal(out, v)
    scaled, _ = interpreted(
        torch.cat([v, v, v], -1), 1, 0.5, next(s for s in range(9) if dropout_mask(s, 1, 1, 1, 0.5))
    )
    assert torch.equal(scaled, (v.double() / 0.5).to(torch.bfloat16))


def test_float32_takes_tf32_where_torch_may():
    if (reason := no_interpreter()) is not None:
        pytest.skip(reason)
    from minigpt2.ops.attention import gpu

    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert gpu.precision(torch.float32) == expected
            assert gpu.precision(torch.bfloat16) == "ieee"  # has no other: the name is float32's alone
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("dtype", "D", "why"),
    [
        (torch.float64, 64, "float16, bfloat16 and float32 on CUDA, not float64"),
        (torch.bfloat16, 24, "multiples of 16 up to 256 on CUDA, not 24"),
        (torch.float32, 144, "multiples of 16 up to 128 on CUDA, not 144"),
    ],
)
def test_what_is_not_served_on_cuda_is_refused_by_name(dtype, D, why):
    assert why in unavailable("cuda", dtype, D)
    with pytest.raises(RuntimeError, match=why):
        resolve_backend("fused", "cuda", dtype, D)
    assert resolve_backend("auto", "cuda", dtype, D) == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_there_is_none():
    assert unavailable("cuda", torch.float32, 64) == "there is no CUDA device"


def test_auto_on_cuda_is_sdpa_and_says_why():
    assert resolve_backend("auto", "cuda", torch.bfloat16, 64) == "sdpa"
    assert "on CUDA fused is there to ask for, but was never timed" in explain_backend()


TOO_MUCH = """
import torch
from compile_for_gpus import Variant, compile_variant, complaint, judges
from minigpt2.ops.attention.gpu import Tiles
for variant in (
    Variant("forward", torch.float16, "ieee", 128, False, Tiles(128, 128, 8, 3), 120),
    Variant("forward", torch.float32, "ieee", 64, True, Tiles(64, 32, 4, 2), 120),
    Variant("forward", torch.float16, "ieee", 64, False, Tiles(64, 64, 4, 2), 120),
):
    print(complaint(variant, compile_variant(variant)))
print(judges())
"""


@pytest.mark.slow
def test_compiling_ahead_of_time_reports_what_takes_too_much(tmp_path):
    """compile_for_gpus.py, of which CI runs the whole: too much for shared memory, too much for the registers."""
    if (reason := no_interpreter()) is not None:
        pytest.skip(reason)
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    process = subprocess.run(
        [sys.executable, "-c", TOO_MUCH], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    shared, spilled, right, judged = process.stdout.splitlines()
    assert "bytes of shared memory, 101376 at most" in shared
    assert ("bytes of stack, 64 at most" in spilled) == (judged == "True")
    assert right == "None"


class Layer(nn.Module):
    def __init__(self, width=128, n_head=2, p=0.1):
        super().__init__()
        self.project, self.n_head, self.p = nn.Linear(width, 3 * width), n_head, p

    def forward(self, x):
        return attention(self.project(x), self.n_head, dropout_p=self.p, backend="fused")


@pytest.mark.cuda
class TestOnCuda:
    @pytest.mark.parametrize("p", [0.0, 0.2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_opcheck(self, dtype, p):
        qkv = torch.randn(2, 20, 3 * 32, device="cuda").to(dtype)
        seed = torch.tensor(3, device="cuda") if p else None
        forward, backward = torch.ops.minigpt2.attention.default, torch.ops.minigpt2.attention_backward.default
        torch.library.opcheck(forward, (qkv.clone().requires_grad_(), 2, p, seed))
        out, lse = forward(qkv, 2, p, seed)
        torch.library.opcheck(backward, (torch.randn_like(out), qkv, out, lse, 2, p, seed))

    def test_compile_without_a_graph_break(self):
        layer, x = Layer(p=0.0).cuda(), torch.randn(2, 30, 128, device="cuda")
        expected = layer(x)
        expected.sum().backward()
        gradient = layer.project.weight.grad.clone()
        layer.zero_grad()
        out = torch.compile(layer, fullgraph=True)(x)
        out.sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(layer.project.weight.grad, gradient, rtol=1e-4, atol=1e-4)

    def test_recomputation_is_bit_exact(self):
        layer, x = Layer().cuda(), torch.randn(2, 100, 128, device="cuda")
        gradients = []
        for recompute in (False, True):
            torch.manual_seed(0)
            layer.zero_grad()
            out = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            out.square().sum().backward()
            gradients.append((out.detach(), layer.project.weight.grad.clone()))
        assert torch.equal(gradients[0][0], gradients[1][0])
        assert torch.equal(gradients[0][1], gradients[1][1])

    def test_a_cuda_graph_draws_anew_at_each_replay(self):
        qkv = torch.randn(2, 64, 3 * 128, device="cuda", dtype=torch.bfloat16)
        attention(qkv, 2, dropout_p=0.5, backend="fused")  # chooses tiles, which waits for the device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(qkv, 2, dropout_p=0.5, backend="fused")
        replays = []
        for _ in range(2):
            graph.replay()
            replays.append(out.clone())
        assert replays[0].isfinite().all()
        assert replays[0].any()
        assert not torch.equal(*replays)

    def test_autocast_gives_bfloat16(self):
        layer, x = Layer(p=0.0).cuda(), torch.randn(2, 30, 128, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert layer.project.weight.grad.dtype == torch.float32

    def test_tf32_is_close(self):
        qkv = torch.randn(2, 200, 3 * 128, device="cuda")
        exact = torch.ops.minigpt2.attention(qkv, 2, 0.0, None)[0]
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            assert relative_error(torch.ops.minigpt2.attention(qkv, 2, 0.0, None)[0], exact) < 2e-3
        finally:
            torch.set_float32_matmul_precision(before)

    def test_the_seed_must_be_on_the_device(self):
        with pytest.raises(ValueError, match="seed"):
            torch.ops.minigpt2.attention(torch.zeros(1, 4, 192, device="cuda"), 1, 0.1, torch.tensor(1))
