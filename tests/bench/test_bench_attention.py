import sys

import pytest
import torch

from minigpt2.__main__ import main
from minigpt2.bench.attention import bench_attention, bench_decode


def test_the_table_has_a_row_for_each_case(capsys):
    tiny = {"n_head": 2, "head_dim": 16, "repeats": 2, "least_seconds": 0.0}
    rows = bench_attention([(1, 32)], dropouts=(0.0, 0.5), decode_shapes=[], **tiny)
    assert [(r.dropout_p, r.backward) for r in rows] == [(0.0, False), (0.0, True), (0.5, False), (0.5, True)]
    assert all(r.rate > 0 and r.ratio_range[0] <= r.ratio <= r.ratio_range[1] and r.share_of_mm > 0 for r in rows)
    assert capsys.readouterr().out.count("B1 T32") == 4
    assert all(r.over_float32 is None for r in rows)
    assert len(bench_decode([(1, 8)], n_head=2, head_dim=16, repeats=2, least_seconds=0.0)) == 1


def test_bfloat16_is_timed_beside_float32(capsys):
    tiny = {"n_head": 2, "head_dim": 16, "repeats": 2, "least_seconds": 0.0}
    (row, _) = bench_attention([(1, 32)], dropouts=(0.0,), dtype="bfloat16", decode_shapes=[], **tiny)
    assert row.over_float32_range[0] <= row.over_float32 <= row.over_float32_range[1]
    assert "x float32" in capsys.readouterr().out


def test_the_head_names_machine_versions_and_command(capsys):
    bench_attention([], decode_shapes=[])
    out = capsys.readouterr().out
    assert out.startswith("bench attention: ")
    assert f"torch {torch.__version__}" in out
    assert f"{torch.get_num_threads()} threads" in out
    assert "command: " in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--dtype", "float16"], "there is nothing to measure: the fused kernel serves float32, bfloat16 and float64"),
        (["--device", "gpu"], "--device gpu is not available"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda is not available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_mistake_in_the_arguments_is_named(arguments, why, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minigpt2", "bench", "attention", *arguments])
    assert main() == 2
    assert why in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_cuda_there_is_a_verdict(dtype, capsys):
    tiny = {"n_head": 2, "head_dim": 64, "repeats": 2, "least_seconds": 0.0}
    assert len(bench_attention([(1, 128)], dtype=dtype, device="cuda", **tiny)) == 4
    assert "faster than sdpa at every shape" in capsys.readouterr().out
