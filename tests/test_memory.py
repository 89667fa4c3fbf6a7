"""The prediction against what PyTorch's profiler sees allocated, byte for byte; and the choice of a notch by budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minigpt2 import GPT2, GPT2Config, memory, pictures
from minigpt2.frontier import fastest_that_fits, notches, worth_it
from minigpt2.memory import Footprint, footprint, parse_bytes
from minigpt2.ops import products
from minigpt2.training.optimizer import make_optimizer
from minigpt2.training.precision import autocast

BETWEEN = "between forward and backward"


def allocated(model: GPT2, ids: torch.Tensor, precision: str = "fp32") -> tuple[int, int]:
    """Bytes held between forward and backward, and at the worst moment, beyond what was held before."""
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with autocast(torch.device("cpu"), precision):
            loss = model.loss(ids, ids)
        with record_function(BETWEEN):
            pass
        loss.backward()
    held = most = between = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
        elif event.name() == BETWEEN:
            between = held
    return between, most


@pytest.mark.parametrize(("batch", "length"), [(1, 64), (4, 128)])
@pytest.mark.parametrize("recompute", ["block", "keep-attention", "pointwise"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.usefixtures("products")
def test_prediction_is_what_is_allocated(batch: int, length: int, recompute: str, dropout: float) -> None:
    """At every notch: what autograd holds to 1%, the worst moment to 3%."""
    config = GPT2Config(vocab_size=3000, n_positions=128, n_embd=128, n_layer=4, n_head=2)
    config = config.replace(embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=dropout)
    model = GPT2(config, recompute=recompute)
    ids = torch.randint(3000, (batch, length))
    model.loss(ids, ids).backward()  # the first run builds the kernel and fills caches
    for k in range(4):
        model.checkpoint_every = k
        model.zero_grad()
        between, most = allocated(model, ids)
        predicted = footprint(config, batch, length, checkpoint_every=k, recompute=recompute)
        assert predicted.activations == pytest.approx(between, rel=0.01), k
        tensors = predicted.tensors
        peak = tensors - predicted.weights - predicted.optimizer
        assert peak == pytest.approx(most, rel=0.03), k


@pytest.mark.parametrize("recompute", ["block", "keep-attention", "pointwise"])
def test_prediction_with_the_optimizer_in_the_backward_pass(recompute: str) -> None:
    config = GPT2Config(vocab_size=3000, n_positions=128, n_embd=128, n_layer=4, n_head=2)
    model, ids = GPT2(config, recompute=recompute), torch.randint(3000, (2, 128))
    recipe = {"lr": 1e-3, "embedding_lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    make_optimizer(model, "adamw", **recipe, in_backward=True)
    allocated(model, ids)  # with which its state comes
    for k in range(4):
        model.checkpoint_every = k
        between, most = allocated(model, ids)
        stepping = memory.Stepping(in_backward=True)
        inside = footprint(config, 2, 128, checkpoint_every=k, recompute=recompute, stepping=stepping)
        apart = footprint(config, 2, 128, checkpoint_every=k, recompute=recompute)
        assert inside.activations == apart.activations == pytest.approx(between, rel=0.01), k
        tensors = inside.tensors
        assert tensors - inside.weights - inside.optimizer == pytest.approx(most, rel=0.03), k
        assert inside.gradients < apart.gradients


@pytest.mark.parametrize("moments", memory.MOMENTS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_optimizers_state_is_counted_to_the_byte(moments: str, tied: bool) -> None:
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=72, n_layer=2, n_head=2)
    model = GPT2(config := config.replace(tie_word_embeddings=tied))
    recipe = {"lr": 1e-3, "embedding_lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    optimizer = make_optimizer(model, "adamw", **recipe, moments=moments)
    optimizer.make_state()
    state = sum(t.nbytes for of_one in optimizer.state.values() for t in of_one.values() if t.dim())
    assert footprint(config, 1, 8, stepping=memory.Stepping(moments, True)).optimizer == state


@pytest.mark.parametrize("recompute", ["block", "keep-attention", "pointwise"])
def test_prediction_under_autocast(recompute: str) -> None:
    # Of a vocabulary so large that oneDNN's own buffers, 1 to 1.5 MB on AMX, are within what is allowed.
    config = GPT2Config(vocab_size=20_000, n_positions=128, n_embd=128, n_layer=4, n_head=2)
    model, ids = GPT2(config, recompute=recompute), torch.randint(20_000, (4, 128))
    allocated(model, ids, "bf16")
    for k in range(0, 4, 3):
        model.checkpoint_every = k
        model.zero_grad()
        between, most = allocated(model, ids, "bf16")
        predicted = footprint(config, 4, 128, checkpoint_every=k, recompute=recompute, precision="bf16")
        assert predicted.activations == pytest.approx(between, rel=0.01), k
        tensors = predicted.tensors
        assert tensors - predicted.weights - predicted.optimizer == pytest.approx(most, rel=0.03), k


def test_gradients_of_earlier_micro_batches_are_counted() -> None:
    one, more = (footprint(GPT2Config(), 4, 1024, accumulate=n) for n in (1, 2))
    assert more.peak - one.peak == pytest.approx(memory.PACKING * one.weights, rel=0.01)


def test_an_accelerators_dropout_keeps_masks_and_its_peak_is_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: False)  # it makes copies, on the CPU only
    here, there = (footprint(GPT2Config(), 4, 1024, device=device) for device in ("cpu", "cuda"))
    assert there.activations - here.activations == 12 * 2 * 4 * 1024 * 768
    still = GPT2Config().replace(resid_pdrop=0.0)
    here, there = (footprint(still, 4, 1024, device=device) for device in ("cpu", "cuda"))
    assert there.activations == here.activations
    tensors = here.tensors
    assert there.peak - memory.WORKSPACE_BYTES == pytest.approx(tensors)


def test_extra_work_is_that_of_the_recomputed_blocks() -> None:
    config = GPT2Config()
    tokens = 4 * 1024
    products, scores = 2 * tokens * 12 * 768 * 768, 2 * 4 * 1024 * 1024 * 768
    step = 12 * (3 * products + 3.5 * scores) + 3 * 2 * tokens * 768 * 50257
    for k in (1, 3, 12):
        assert footprint(config, 4, 1024, checkpoint_every=k).extra_flops == (12 - k) * (products + scores)
        kept = footprint(config, 4, 1024, checkpoint_every=k, recompute="keep-attention")
        last = sum(s.recomputed for s in memory.segments(12, k)) * 2 * tokens * 4 * 768 * 768
        assert kept.extra_flops == (12 - k) * products - last
    assert footprint(config, 4, 1024).flops == step
    assert 0 < footprint(config, 4, 1024, recompute="pointwise").extra_work < 0.005


def test_weights_and_optimizer_are_those_of_the_model() -> None:
    model = GPT2(GPT2Config(vocab_size=300, n_positions=16, n_embd=32, n_layer=3, n_head=2, n_inner=50))
    f = footprint(model.config, 1, 8, optimizer="adamw")
    assert f.weights == f.gradients == f.optimizer / 2 == 4 * sum(p.numel() for p in model.parameters())
    assert footprint(model.config, 1, 8, optimizer="sgd").optimizer == 0
    assert footprint(model.config, 1, 8, precision="bf16").weights == f.weights


def test_every_notch_is_there_once_least_memory_first() -> None:
    found = notches(GPT2Config(), 4, 1024)
    assert [f.peak for f in found] == sorted(f.peak for f in found)
    settings = [(f.checkpoint_every, f.recompute) for f in found]
    assert len(set(settings)) == len(settings) == 12 + 11 + 12
    least, most = found[0], found[-1]
    peaks = {(f.checkpoint_every, f.recompute): f.peak for f in found}
    assert peaks[1, "block"] == least.peak  # as in the table of minigpt2/bench/README.md
    assert (most.checkpoint_every, most.recompute) == (0, "block")


def test_the_fastest_that_fits() -> None:
    found = notches(GPT2Config(), 4, 1024)
    peaks = {(f.checkpoint_every, f.recompute): f.peak for f in found}

    def choice(budget: int) -> Footprint:
        return fastest_that_fits(found, budget)

    assert choice(max(peaks.values())).extra_flops == 0
    below = choice(peaks[0, "block"] - 1)
    assert (below.checkpoint_every, below.recompute) == (0, "pointwise")
    for budget in sorted(peaks.values()):
        chosen = choice(budget)
        assert chosen.peak <= budget
        assert not [f for f in found if f.peak <= budget and f.extra_flops < chosen.extra_flops]
    with pytest.raises(ValueError, match=r"nothing fits 1.00 GiB: the least is .* checkpoint_every=1"):
        choice(2**30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GiB", 4 * 2**30), ("512 MiB", 2**29), ("2GB", 2 * 10**9), ("1.5gib", 3 * 2**29), ("3e9", 3 * 10**9)],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "4 apples", "-1GiB", "0", "4GiB2", "1e400", "9" * 400])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected an amount of memory such as 4GiB"):
        parse_bytes(text)


def test_settings_out_of_range() -> None:
    for settings in (
        {"checkpoint_every": 13},
        {"recompute": "some"},
        {"optimizer": "lion"},
        {"precision": "fp8"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            footprint(GPT2Config(), 1, 8, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the memory of fp16 on a CPU is not predicted"):
        footprint(GPT2Config(), 1, 8, precision="fp16")
    for batch, length in ((0, 8), (1, 0), (1, 1025)):
        with pytest.raises(ValueError, match="batch must be >= 1 and length 1 to n_positions=1024"):
            footprint(GPT2Config(), batch, length)


def test_the_optimizer_in_the_backward_pass_is_chosen_where_it_saves_time() -> None:
    found = notches(GPT2Config(), 4, 1024, memory.steppings())
    apart = notches(GPT2Config(), 4, 1024)
    for f in apart:
        chosen, before = fastest_that_fits(found, f.peak), fastest_that_fits(apart, f.peak)
        assert chosen.extra_flops < before.extra_flops or chosen == before
    least = fastest_that_fits(found, apart[0].peak - 1)
    assert least.stepping == memory.Stepping(in_backward=True)
    assert "optimizer_in_backward=True" in least.dials
    assert [f.extra_flops for f in worth_it(found)] == sorted({f.extra_flops for f in worth_it(found)}, reverse=True)


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures.frontier(notches(GPT2Config(), 1, 64), tmp_path / "frontier.png", budget=2**30)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
