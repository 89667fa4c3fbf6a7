"""One step of training without a device's values: what would wait for the device, or go through the CPU, raises."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minigpt2 import GPT2, GPT2Config
from minigpt2.device import peak_bytes, pick_device, resident_bytes
from minigpt2.recompute import RECOMPUTE
from minigpt2.training.parallel import LossSum, Processes
from minigpt2.training.step import accumulate_gradients, mean_loss

CONFIG = GPT2Config(vocab_size=211, n_positions=32, n_embd=32, n_layer=3, n_head=2)  # every dropout at 0.1
META = Processes(device=torch.device("meta"))


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(CONFIG.vocab_size, (4, 17))
    return tokens[:, :-1], tokens[:, 1:]


def optimise(model: GPT2) -> Tensor:
    """The rest of a step: clip, and update."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    return norm


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
def test_a_step_reads_no_value_of_the_device(checkpoint_every: int, recompute: str, attention: str) -> None:
    with META.device:
        model = GPT2(CONFIG, checkpoint_every=checkpoint_every, recompute=recompute, attention=attention)
    mean, count = accumulate_gradients(LossSum(model), [batch(), batch()], META)
    assert count == 2 * 4 * 16  # of the targets, which are on the CPU
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):  # a value that is read would have raised
        torch.stack([mean, optimise(model).to(mean)]).tolist()


def test_a_padded_batch_reads_no_value_of_the_device() -> None:
    with META.device:
        model = GPT2(CONFIG)
        ids = torch.zeros(2, 8, dtype=torch.long)
        assert model.loss(ids, ids, attention_mask=torch.ones(2, 8), reduction="none").shape == (2, 8)


def test_validation_waits_once_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with META.device:
        model = GPT2(CONFIG)
    seen = []
    monkeypatch.setattr(torch, "stack", lambda losses: seen.append(len(losses)) or torch.tensor([1.0, 2.0, 3.0]))
    assert mean_loss(LossSum(model), [batch(), batch(), batch()], META, "fp32") == 6 / (3 * 4 * 16)
    assert seen == [3]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_the_operations_of_the_kernel_have_shapes_without_values(checkpoint_every: int, recompute: str) -> None:
    with FakeTensorMode():
        model = GPT2(CONFIG, checkpoint_every=checkpoint_every, recompute=recompute, attention="fused")
        ids = torch.zeros(2, 8, dtype=torch.long)
        loss = model.loss(ids, ids)
        loss.backward()
        assert optimise(model).shape == loss.shape == ()
    assert all(p.grad is None for p in model.parameters())


def test_auto_is_the_best_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == expected
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", "cpu:1", "", "cuda:x"])
def test_a_device_that_is_not_here_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"--device {name} is not available; there is .*cpu"):
        pick_device(name)


def test_memory_now_and_at_its_peak() -> None:
    cpu = torch.device("cpu")
    now, peak = resident_bytes(), peak_bytes(cpu)
    assert 10 * 2**20 < now <= peak
    size = peak - now + 2**26
    tensor = torch.ones(size, dtype=torch.uint8)
    assert resident_bytes() > now + 0.9 * size
    peak = peak_bytes(cpu)
    assert peak > now + 0.9 * size
    del tensor
    assert resident_bytes() < peak
    assert peak_bytes(cpu) > 0.99 * peak  # Linux counts roughly


def no_proc(path: Path) -> str:
    raise FileNotFoundError(path)


def test_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource")
    peak = peak_bytes(torch.device("cpu"))
    monkeypatch.setattr(Path, "read_text", no_proc)
    assert peak_bytes(torch.device("cpu")) == pytest.approx(peak, rel=0.2)
    assert resident_bytes() == peak_bytes(torch.device("cpu"))


def test_memory_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the layout of PROCESS_MEMORY_COUNTERS; Windows itself has not been tried."""

    def get(process: ctypes.c_void_p, counters: ctypes.Array, size: int) -> None:
        assert (ctypes.sizeof(counters), counters[0], size) == (72, 72, 72)
        counters[1:3] = [3000, 2000]

    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(Path, "read_text", no_proc)
    monkeypatch.setattr(sys, "platform", "win32")
    kernel32 = SimpleNamespace(K32GetProcessMemoryInfo=get)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    assert (resident_bytes(), peak_bytes(torch.device("cpu"))) == (2000, 3000)


@pytest.mark.cuda
def test_a_step_on_cuda_waits_for_nothing() -> None:
    """Needs the device: PyTorch raises where a call would wait for it."""
    device = torch.device("cuda")
    model = GPT2(CONFIG, attention="sdpa").to(device)
    accumulate_gradients(LossSum(model), [batch()], Processes(device=device))
    model.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mean, _ = accumulate_gradients(LossSum(model), [batch(), batch()], Processes(device=device))
        norm = optimise(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack([mean, norm.to(mean)]).isfinite().all()
