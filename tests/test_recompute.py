"""checkpoint_every: which blocks run twice, exactly the same numbers, and the memory it saves."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from operations import CountOperations
from tiny_runs import needs_fsdp
from torch import Tensor, nn

import minigpt2.recompute as recompute_module
from minigpt2 import GPT2, GPT2Config, KVCache
from minigpt2.model import Projection
from minigpt2.ops import kernel
from minigpt2.recompute import RECOMPUTE, segments
from minigpt2.training.parallel import Processes, distribute

L = 6
CONFIG = GPT2Config(vocab_size=211, n_positions=32, n_embd=64, n_layer=L, n_head=4)  # every dropout at 0.1
NOTCHES = range(L + 1)


def make_model(**settings: object) -> GPT2:
    torch.manual_seed(0)
    return GPT2(CONFIG, **settings)  # type: ignore[arg-type]


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(CONFIG.vocab_size, (3, 25), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_gradients(model: GPT2, seed: int = 7) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model.loss(*batch())
    loss.backward()
    after = torch.rand(())  # where the random state stands
    return [loss.detach(), after, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@contextmanager
def runs_counted(model: GPT2) -> Iterator[Counter[int]]:
    """Count how often each block starts and finishes a forward pass."""
    counts: Counter[int] = Counter()
    hooks = []
    for i, block in enumerate(model.h):
        hooks.append(block.register_forward_pre_hook(lambda *_, i=i: counts.update([i])))
        hooks.append(block.register_forward_hook(lambda *_, i=i: counts.update([i])))
    yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("n_layer", "k", "expected"),
    [
        (12, 0, [(0, 12, False)]),
        (12, 12, [(0, 12, False)]),
        (12, 5, [(0, 2, True), (2, 7, True), (7, 12, False)]),
        (3, 1, [(0, 1, True), (1, 2, True), (2, 3, False)]),
        (3, 2, [(0, 1, True), (1, 3, False)]),
        (1, 1, [(0, 1, False)]),
    ],
)
def test_segments_are_counted_from_the_end(n_layer: int, k: int, expected: list[tuple[int, int, bool]]) -> None:
    assert segments(n_layer, k) == expected


@pytest.mark.parametrize("n_layer", [1, 2, 5, 12, 48])
def test_segments_partition_the_stack_and_recompute_L_minus_k_blocks(n_layer: int) -> None:
    for k in range(1, n_layer + 1):
        cut = segments(n_layer, k)
        assert [i for s in cut for i in range(s.start, s.stop)] == list(range(n_layer))
        assert sum(s.stop - s.start for s in cut if s.recomputed) == n_layer - k


@pytest.mark.parametrize("k", NOTCHES)
def test_exactly_the_first_L_minus_k_blocks_run_twice(k: int) -> None:
    model = make_model(checkpoint_every=k)
    with runs_counted(model) as counts:
        loss_and_gradients(model)
    recomputed = L - k if k else 0
    assert [counts[i] for i in range(L)] == [4] * recomputed + [2] * (L - recomputed)  # start and finish of each run


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.usefixtures("products")
def test_loss_gradients_and_random_state_are_bit_identical_for_every_k(backend: str) -> None:
    model = make_model(attention=backend)
    expected = loss_and_gradients(model)
    assert not torch.equal(expected[0], loss_and_gradients(model, seed=8)[0])  # dropout is really on
    for k in NOTCHES:
        model.checkpoint_every = k
        for got, want in zip(loss_and_gradients(model), expected, strict=True):
            assert torch.equal(got, want), k


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("recompute", ["keep-attention", "pointwise"])
@pytest.mark.usefixtures("products")
def test_what_a_recomputed_block_keeps_changes_no_bit(recompute: str, backend: str) -> None:
    model = make_model(attention=backend)
    expected = loss_and_gradients(model)
    model.recompute = recompute
    for k in NOTCHES:
        model.checkpoint_every = k
        for got, want in zip(loss_and_gradients(model), expected, strict=True):
            assert torch.equal(got, want), k


def operations(k: int, recompute: str) -> Counter[str]:
    torch.manual_seed(0)
    # Without dropout sdpa is one operation on every device; and PyTorch's own, which takes the place of the kernel's in
    # the residual stream, would keep a mask that follows the last product.
    config = CONFIG.replace(attn_pdrop=0.0, **({"resid_pdrop": 0.0} if kernel.unavailable() else {}))
    model = GPT2(config, checkpoint_every=k, recompute=recompute, attention="sdpa")
    with CountOperations() as mode:
        loss_and_gradients(model)
    return mode.counts


SDPA = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCT = {"torch.mm": "addmm", "oneDNN": "_linear_pointwise"}


def test_block_runs_everything_of_L_minus_k_blocks_again(products: str) -> None:
    plain, again = operations(0, "block"), operations(2, "block")
    for name, per_block in ((SDPA, 1), (PRODUCT[products], 4), ("native_layer_norm", 2), ("gelu", 1)):
        assert again[name] - plain[name] == per_block * (L - 2), name


def test_keep_attention_runs_neither_attention_nor_the_last_product_of_a_segment_again(products: str) -> None:
    plain, kept = operations(0, "block"), operations(2, "keep-attention")
    assert plain[SDPA] == kept[SDPA] == L
    assert kept[PRODUCT[products]] - plain[PRODUCT[products]] == 4 * (L - 2) - (L - 2) / 2


def test_pointwise_runs_no_matrix_product_and_no_attention_again(products: str) -> None:
    plain, lean = operations(0, "block"), operations(0, "pointwise")
    assert plain[PRODUCT[products]] >= 4 * L
    for name in (SDPA, PRODUCT[products], "mm"):
        assert plain[name] == lean[name], name
    assert lean["native_layer_norm"] - plain["native_layer_norm"] == 2 * L
    assert lean["gelu"] - plain["gelu"] == L


@pytest.mark.parametrize("recompute", ["", "all", None])
def test_an_unknown_way_to_recompute_is_a_value_error(recompute: object) -> None:
    with pytest.raises(ValueError, match="recompute must be one of block, keep-attention, pointwise, got"):
        make_model(recompute=recompute)


def test_under_autocast() -> None:
    results = []
    for k, recompute in ((0, "block"), *((k, r) for k in (0, 1, 4) for r in RECOMPUTE)):
        model = make_model(checkpoint_every=k, recompute=recompute)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(loss_and_gradients(model))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.usefixtures("products")
def test_with_gradient_accumulation_and_a_dial_that_moves_between_steps() -> None:
    def two_steps(dial: tuple[int, int]) -> list[Tensor]:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for k in dial:
            model.checkpoint_every = k
            for seed in (1, 2):
                (model.loss(*batch(seed)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    for moved, still in zip(two_steps((1, 4)), two_steps((0, 0)), strict=True):
        assert torch.equal(moved, still)


MODES = [(k, recompute) for recompute in RECOMPUTE for k in (0, 1, 4)][1:]  # the first is no recomputation


def check_every_mode(model: GPT2) -> None:
    """That loss, random state and gradients are those of no recomputation, bit for bit."""
    expected = loss_and_gradients(model)
    for model.checkpoint_every, model.recompute in MODES:
        found = loss_and_gradients(model)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected)), (model.checkpoint_every, model.recompute)


class LoRA(nn.Module):
    """Hu et al. 2021, arXiv:2106.09685: what a user may put in the place of a projection. Draws random numbers."""

    def __init__(self, base: Projection) -> None:
        super().__init__()
        n_in, n_out = base.weight.shape
        self.base = base
        self.dropout = nn.Dropout(0.5)
        self.A, self.B = nn.Parameter(torch.randn(n_in, 4)), nn.Parameter(torch.randn(4, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.A @ self.B


@pytest.mark.parametrize("replaced", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
@pytest.mark.usefixtures("products")
def test_a_projection_that_draws_random_numbers(replaced: str) -> None:
    model = make_model().requires_grad_(False)
    half, name = replaced.split(".")
    for block in model.h:
        part = getattr(block, half)
        setattr(part, name, LoRA(getattr(part, name)))
    check_every_mode(model)


def test_modules_that_draw_random_numbers_everywhere() -> None:
    model = make_model()
    for block in model.h:
        block.ln_1 = nn.Sequential(block.ln_1, nn.Dropout(0.3))
        block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.3), nn.Linear(64, 64))
    check_every_mode(model)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_peft(dropout: float) -> None:
    """As weights/README.md says: PEFT's layers are made for Linear and for Conv1D, whose layout is ours."""
    peft = pytest.importorskip("peft")

    config = peft.LoraConfig(
        target_modules=["c_attn"], lora_dropout=dropout, fan_in_fan_out=True, init_lora_weights=False
    )
    config._register_custom_module({Projection: peft.tuners.lora.Linear})
    model = make_model()
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * L
    check_every_mode(model)
    before = [p.detach().clone() for p in trained]
    torch.optim.SGD(trained, lr=1.0).step()
    assert not any(map(torch.equal, before, trained))


FROZEN = {
    "the first blocks": lambda name: name.startswith(("wte", "wpe", "h.0", "h.1", "h.2")),
    "the last blocks": lambda name: name.startswith(("h.3", "h.4", "h.5")),
    "all but the biases": lambda name: "bias" not in name,
    "single weights": lambda name: name in ("h.1.attn.c_attn.weight", "h.2.ln_2.weight", "h.4.mlp.c_proj.weight"),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.usefixtures("products")
def test_with_frozen_parameters(frozen: str) -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    check_every_mode(model)


def test_with_hooks() -> None:
    """Of modules and of parameters, forward and backward."""
    model = make_model()
    for block in model.h:
        block.mlp.register_forward_hook(lambda module, inputs, output: output * 1.5)
        block.attn.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.25, *inputs[1:]))
        block.attn.register_full_backward_hook(
            lambda module, grad_inputs, grad_outputs: (grad_inputs[0] * 0.5, *grad_inputs[1:])
        )
        block.ln_2.weight.register_hook(lambda gradient: gradient * 2)
    check_every_mode(model)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_under_ddp_and_fsdp(engine: Literal["ddp", "fsdp"], tmp_path: Path) -> None:
    """On one process; tests/training/test_parallel.py has more of them."""
    if engine == "fsdp":
        needs_fsdp()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = make_model()
        network = distribute(model, engine, Processes())
        results = []
        for model.checkpoint_every, model.recompute in [(0, "block"), *MODES]:
            model.zero_grad()
            torch.manual_seed(7)
            loss = network(*batch())
            loss.backward()
            gradients = [p.grad.full_tensor() if engine == "fsdp" else p.grad.clone() for p in model.parameters()]
            results.append([loss.detach(), *gradients])
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))
    finally:
        gc.collect()
        dist.destroy_process_group()


def test_it_is_said_once_where_attention_is_recomputed_all_the_same(recwarn: pytest.WarningsRecorder) -> None:
    def said(attention: str, recompute: str, p: float) -> int:
        recompute_module._warn_once.cache_clear()
        recwarn.clear()
        warnings.simplefilter("always")
        torch.manual_seed(0)
        model = GPT2(CONFIG.replace(attn_pdrop=p), checkpoint_every=2, recompute=recompute, attention=attention)
        for _ in range(2):
            loss_and_gradients(model)
        return sum("attention is recomputed all the same" in str(w.message) for w in recwarn)

    assert said("eager", "keep-attention", 0.0) == said("sdpa", "keep-attention", 0.1) == 1
    assert said("eager", "pointwise", 0.0) == 1
    assert said("sdpa", "keep-attention", 0.0) == said("eager", "block", 0.0) == 0


def test_an_operation_that_pytorch_renames_breaks_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ("ATTENTION", "PRODUCTS", "SOFTMAX"):
        gone = ("aten::gone", "no_such_library::gone")
        monkeypatch.setattr(recompute_module, names, (*gone, *getattr(recompute_module, names)[1:]))
    check_every_mode(make_model(attention="eager"))


def test_with_a_padded_batch() -> None:
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[1, :9] = 0
    gradients = []
    for k in (0, 1, 4):
        model = make_model(checkpoint_every=k)
        torch.manual_seed(3)
        model.loss(*batch(), attention_mask=mask).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))


@pytest.mark.usefixtures("products")
def test_autograd_grad_of_some_parameters_only() -> None:
    """Gradients reach whoever asks for them, not only the .grad fields."""
    model = make_model(checkpoint_every=2)
    wanted = [model.wpe.weight, model.h[0].attn.c_attn.weight, model.h[5].ln_2.bias]
    torch.manual_seed(7)
    got = torch.autograd.grad(model.loss(*batch()), wanted)
    model.checkpoint_every = 0
    torch.manual_seed(7)
    assert all(map(torch.equal, got, torch.autograd.grad(model.loss(*batch()), wanted)))


@pytest.mark.parametrize("case", ["no_grad", "cache"])
def test_nothing_is_recomputed_without_a_gradient_or_with_a_cache(case: str) -> None:
    model = make_model(checkpoint_every=1)
    cache = KVCache(model, 3) if case == "cache" else None
    with runs_counted(model) as counts, torch.set_grad_enabled(case != "no_grad"):
        logits = model(batch()[0], cache=cache)
        if logits.requires_grad:
            logits.sum().backward()
    assert set(counts.values()) == {2}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_dial_works_in_evaluation_mode_too(recompute: str) -> None:
    """Gradients may be wanted there as well, and from_pretrained gives models in evaluation mode."""
    model = make_model(checkpoint_every=2, recompute=recompute).eval()
    with CountOperations() as mode:
        found = loss_and_gradients(model)
    assert mode.counts["native_layer_norm"] > 2 * L + 1
    model.checkpoint_every, model.recompute = 0, "block"
    assert all(map(torch.equal, found, loss_and_gradients(model)))


@pytest.mark.parametrize("k", [-1, L + 1, 1.0, True, None, "2"])
def test_anything_else_is_a_value_error(k: object) -> None:
    with pytest.raises(ValueError, match=r"checkpoint_every must be an integer from 0 \(off\) to n_layer=6, got"):
        make_model(checkpoint_every=k)
    model = make_model(checkpoint_every=2)
    with pytest.raises(ValueError, match="checkpoint_every"):
        model.checkpoint_every = k  # type: ignore[assignment]
    assert model.checkpoint_every == 2


PEAK = """
import re, sys, torch
from pathlib import Path
from minigpt2 import GPT2, GPT2Config
config = GPT2Config(vocab_size=64, n_positions=256, n_embd=256, n_layer=12, n_head=4)
model = GPT2(config, checkpoint_every=int(sys.argv[1]))
ids = torch.randint(64, (4, 256))
# Not ru_maxrss, in which a child process inherits the peak of its parent.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
model.loss(ids[:1, :8], ids[:1, :8]).backward()  # imports and buffers of the first run
model.zero_grad()
before = peak()
model.loss(ids, ids).backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_less_is_kept_with_a_smaller_k() -> None:
    # A fixed threshold makes glibc return what is freed to the system at once, so that the peak is what was in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}

    def peak(k: int) -> int:
        command = [sys.executable, "-c", PEAK, str(k)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    peaks = [peak(k) for k in (0, 6, 1)]
    assert peaks[0] > 1.3 * peaks[1] > 1.3 * 1.3 * peaks[2]
