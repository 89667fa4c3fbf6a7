"""torch.compile takes the model's loss as one graph, at every notch of the dials, and changes nothing but rounding.

Most cases stop before Inductor, which takes a C++ compiler many seconds: the graph is the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import arguments, curve, launch, outcome
from torch import Tensor

from minigpt2 import GPT2, GPT2Config
from minigpt2.ops import kernel
from minigpt2.training import parallel
from minigpt2.training.parallel import LossSum, Processes, compiled, distribute

CONFIG = GPT2Config(vocab_size=211, n_positions=32, n_embd=32, n_layer=3, n_head=2)


def traced(function):
    """`compiled`, but for Inductor: what is traced and differentiated is run as it is."""
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)


@pytest.fixture(autouse=True)
def from_scratch():
    torch._dynamo.reset()


def make_model(dropout: float, **dials: object) -> GPT2:
    torch.manual_seed(0)
    config = CONFIG.replace(embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=dropout)
    return GPT2(config, **dials)  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(CONFIG.vocab_size, (3, 25), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_gradients(model: GPT2, loss_of, seed: int = 7) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = loss_of(*batch())
    loss.backward()
    after = torch.rand(())  # where the random state stands
    return [loss.detach(), after, *(p.grad.clone() for p in model.parameters())]


def check_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        assert (got - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize("recompute", ["block", "keep-attention", "pointwise"])
@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
def test_one_graph_with_the_same_numbers(checkpoint_every: int, recompute: str, dropout: float) -> None:
    model = make_model(dropout, checkpoint_every=checkpoint_every, recompute=recompute)
    loss_of = traced(model.loss)
    found = loss_and_gradients(model, loss_of)
    check_close(found, loss_and_gradients(model, model.loss))
    assert all(map(torch.equal, loss_and_gradients(model, loss_of), found))
    other = loss_and_gradients(model, loss_of, seed=8)
    assert torch.equal(other[0], found[0]) == (dropout == 0)  # the masks are those of the seed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_other_backends(attention: str) -> None:
    model = make_model(0.1, attention=attention, checkpoint_every=1)
    check_close(loss_and_gradients(model, traced(model.loss)), loss_and_gradients(model, model.loss))


def test_under_autocast() -> None:
    model = make_model(0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (loss_and_gradients(model, f) for f in (traced(model.loss), model.loss))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-3)


def kept_bytes(loss_of) -> int:
    """Bytes of the distinct tensors that autograd keeps of a forward pass."""
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_of(*batch())
    return sum(kept.values())


def test_the_dial_acts_in_the_graph() -> None:
    """The compiler keeps what the dial says, or less, since it may recompute on its own what is cheap."""
    model = make_model(0.1)
    kept = {}
    for dial in (0, 2, 1):
        model.checkpoint_every = dial
        kept[dial] = kept_bytes(traced(model.loss))
    residual = 3 * 24 * 32 * 4
    assert kept[0] - kept[2] > 8 * residual
    assert kept[2] - kept[1] > 8 * residual


def test_the_dial_may_move_between_steps() -> None:
    model = make_model(0.1)
    loss_of = traced(model.loss)
    expected = loss_and_gradients(model, model.loss)
    for dial in (0, 1, 2, 0):
        model.checkpoint_every = dial
        check_close(loss_and_gradients(model, loss_of), expected)


@pytest.fixture
def cxx() -> None:
    if reason := kernel.unavailable():
        pytest.skip(reason)


@pytest.mark.usefixtures("cxx")
@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint_every", "recompute"), [(1, "block"), (2, "keep-attention"), (1, "pointwise")])
def test_inductor(checkpoint_every: int, recompute: str) -> None:
    """The real thing; dropout has the masks of the model that is not compiled, whatever order Inductor takes, and the
    names are what they were. Evaluation is left alone."""
    model = make_model(0.1, checkpoint_every=checkpoint_every, recompute=recompute)
    names = list(model.state_dict())
    network = LossSum(model, compile=True)
    plain = LossSum(model)
    found = loss_and_gradients(model, network)
    check_close(found, loss_and_gradients(model, plain))
    assert all(map(torch.equal, loss_and_gradients(model, network), found))
    assert list(model.state_dict()) == names
    assert list(network.state_dict()) == list(plain.state_dict())
    assert torch.equal(network.eval()(*batch()), plain.eval()(*batch()))


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "unavailable", lambda: "no C++ compiler: 'c++' was not found")
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler: no C\+\+ compiler"):
        distribute(make_model(0.0), None, Processes(), compile=True)


def test_fsdp_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--compile cannot be combined with --parallel fsdp"):
        distribute(make_model(0.0), "fsdp", Processes(), compile=True)


SETTINGS = {"dropout": 0.1, "accumulate": 2, "snapshot_every": 5, "max_steps": 12, "warmup": 3, "checkpoint_every": 1}


@pytest.fixture
def run(run):
    return lambda out, resume=False, **changes: run(out, resume=resume, **(changes if resume else SETTINGS | changes))


class Crash(Exception):
    pass


def crash(trainer: object) -> None:
    raise Crash


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(run, at_step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "compiled", traced)
    run(tmp_path / "whole", compile=True)
    at_step(8, crash)
    with pytest.raises(Crash):
        run(tmp_path / "broken", compile=True)
    torch._dynamo.reset()
    run(tmp_path / "broken", resume=True)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert "_orig_mod" not in str(load_file(tmp_path / "whole" / "model.safetensors").keys())
    run(tmp_path / "plain")
    for a, b in zip(curve(tmp_path / "whole"), curve(tmp_path / "plain"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_number_that_is_not_finite_is_traced_to_its_module(run, at_step, tmp_path: Path, monkeypatch) -> None:
    """Whose hooks look at every tensor, which no graph does."""
    monkeypatch.setattr(parallel, "compiled", traced)
    at_step(4, lambda trainer: trainer.model.h[1].mlp.c_fc.bias.data.fill_(float("nan")))
    assert "h.1.mlp.c_fc is the first that is not finite" in run(tmp_path, compile=True, status=1)


@pytest.mark.slow
@pytest.mark.usefixtures("cxx")
def test_two_processes(inputs: list[str], run, tmp_path: Path) -> None:
    changes = {"dropout": 0.0, "max_steps": 3}
    settings = [*inputs, *arguments(SETTINGS | changes), "--compile", "--out", str(tmp_path / "two")]
    assert "cpu x 2 (ddp)" in launch(*settings, processes=2)
    run(tmp_path / "one", **changes)
    for a, b in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_compiled_refuses_what_is_no_graph() -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(RuntimeError, match="graph_break"):
        compiled(broken)(torch.ones(2))
