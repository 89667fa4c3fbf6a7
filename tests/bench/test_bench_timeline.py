"""The timeline of a step: what runs again, and what is held meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from minigpt2 import GPT2Config
from minigpt2.bench.timeline import bench_timeline
from minigpt2.memory import footprint

SHAPE = {"vocab_size": 300, "n_positions": 64, "n_embd": 64, "n_layer": 4, "n_head": 2}


def test_bench_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "timeline.png"
    found = bench_timeline(config=SHAPE, batch=2, length=64, every=(0, 2, 1), out=out)
    assert out.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.startswith("bench timeline: ")
    for k, again, timeline in zip((0, 2, 1), (0, 2, 3), found, strict=True):
        runs = [timeline.spans[f"block {i}"] for i in range(4)]
        assert [len(run) for run in runs] == [2] * again + [1] * (4 - again)
        forward, backward, optimizer = (timeline.spans[part][0] for part in ("forward", "backward", "optimizer"))
        assert forward[1] <= backward[0] < backward[1] <= optimizer[0]
        assert all(backward[0] < start and stop < backward[1] for run in runs for start, stop in run[1:])
        ends = [timeline.spans[f"backward of block {i}"][0][1] for i in range(4)]
        assert ends == sorted(ends, reverse=True)

        predicted = footprint(GPT2Config(**SHAPE), 2, 64, checkpoint_every=k)
        assert (timeline.weights, timeline.optimizer) == pytest.approx(
            (predicted.weights, predicted.optimizer), rel=0.01
        )
        head = 4 * SHAPE["vocab_size"] * SHAPE["n_embd"]  # its gradient is there by then
        assert timeline.kept + head == pytest.approx(predicted.activations, rel=0.02)
        assert max(timeline.gradients) == predicted.gradients
        assert timeline.gradients[-1] == pytest.approx(0, abs=0.01 * predicted.gradients)
    assert found[0].peak > found[1].peak > found[2].peak


def test_an_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"model must be one of gpt2, .* got 'gpt3'"):
        bench_timeline("gpt3")
