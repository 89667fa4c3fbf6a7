"""One more token in one call: the numbers of the operations one by one, whatever stands in their way is heeded, and no
memory is touched that is not the call's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from minigpt2 import GPT2, GPT2Config, KVCache
from minigpt2.generate import generate, stream
from minigpt2.model import MLP, Projection
from minigpt2.ops import blocks, kernel

pytestmark = pytest.mark.usefixtures("needs_the_kernel")


def made(n_layer: int = 2, n_head: int = 2, head_dim: int = 16, **settings: Any) -> GPT2:
    """A model whose every parameter is random, also those that begin as 0 or 1."""
    torch.manual_seed(n_layer)
    config = GPT2Config(
        vocab_size=97, n_positions=90, n_embd=n_head * head_dim, n_layer=n_layer, n_head=n_head, **settings
    )
    model = GPT2(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.2)
    return model


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """What a function is called with from now on."""
    found: list[Any] = []
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: found.append(args) or function(*args))
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the one call was called with."""
    return recorded(monkeypatch, kernel, "decode_blocks")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One for each time that the blocks were asked what they are."""
    return recorded(monkeypatch, blocks, "_laid_out")


def continued(model: GPT2, ids: Tensor, prompt: int) -> tuple[Tensor, KVCache]:
    """Logits of every position, of a prompt in one pass and of the others token by token, and the cache."""
    cache = KVCache(model, len(ids), ids.size(1))
    pieces = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    return torch.cat([model(piece, cache=cache) for piece in pieces if piece.numel()], dim=1), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "B", "prompt", "T"),
    [
        ({"n_layer": 1}, 1, 0, 3),  # the first token of all is one more, too
        ({"n_layer": 3, "head_dim": 48, "n_inner": 32}, 3, 5, 9),
        ({"n_head": 1, "head_dim": 256, "scale_attn_by_inverse_layer_idx": True}, 8, 66, 68),
        ({"n_head": 12, "head_dim": 64, "scale_attn_weights": False}, 2, 70, 72),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_numbers_are_those_of_the_operations(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: Any, B: int, prompt: int, T: int
) -> None:
    model = made(**shape).to(dtype)
    model.h[0].ln_1.eps, model.h[-1].ln_2.eps = 0.3, 0.7
    ids = torch.randint(97, (B, T), generator=torch.Generator().manual_seed(0))
    found, cache = continued(model, ids, prompt)
    assert len(calls) == T - prompt
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "serves_blocks", lambda *args: False)
        plain, plain_cache = continued(model, ids, prompt)
    assert len(calls) == T - prompt
    exact = model.double()(ids)
    assert (found - exact).norm() <= 2 * (plain - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    for layer, other in zip(cache.layers, plain_cache.layers, strict=True):
        assert layer.length == other.length == T
        close = {"rtol": 0, "atol": 20 * torch.finfo(dtype).eps * float(other.k.abs().max())}
        torch.testing.assert_close(layer.k, other.k, **close)
        torch.testing.assert_close(layer.v, other.v, **close)


@torch.no_grad()
def test_generation_takes_it_and_sees_weights_that_change_between_two_tokens(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for served in (True, False):
        model, tokens = made(), []
        if not served:
            monkeypatch.setattr(kernel, "serves_blocks", lambda *args: False)
        for i, token in enumerate(stream(model, torch.arange(6).view(2, 3), 20, temperature=0)):
            tokens.append(token)
            if i == 9:
                model.h[0].mlp.c_fc.weight.data = model.h[1].mlp.c_fc.weight.flip(0)
        texts.append(torch.stack(tokens))
        assert len(calls) == 19
    assert torch.equal(*texts)


@torch.no_grad()
def test_generate_asks_once_what_the_blocks_are_and_gives_what_stream_gives(calls: list[Any], looks: list[Any]) -> None:
    model, prompt = made().train(), torch.arange(6).view(2, 3)
    model.h[1].eval()
    modes = [module.training for module in model.modules()]
    for _ in range(2):  # the second time with other weights
        looks.clear()
        calls.clear()
        streamed = torch.stack([*stream(model, prompt, 20, temperature=0)], dim=1)
        assert len(looks) == len(calls) == 19
        assert torch.equal(generate(model, prompt, 20, temperature=0)[:, 3:], streamed)
        assert len(looks) == 20
        assert len(calls) == 38
        assert [module.training for module in model.modules()] == modes
        model.h[0].mlp.c_fc.weight.data = model.h[1].mlp.c_fc.weight.flip(0)


def changing(model: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which changes a block when it is called for the fifth time."""
    count = iter(range(100))

    def called(*args: Any, **settings: Any) -> Any:
        if next(count) == 4:
            model.h[0].mlp.c_fc.weight.data = model.h[1].mlp.c_fc.weight.flip(0)
        return function(*args, **settings)

    return called


def subclass(model: Any, name: str, method: str = "forward") -> None:
    module = model.get_submodule(name)
    kind = type(module)
    module.__class__ = type("Sub", (kind,), {method: changing(model, getattr(kind, method)), "__module__": __name__})


MEANWHILE: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda model: model.wpe.register_forward_hook(changing(model, lambda *_: None)) and None,
    "a hook of the stack": lambda model: model.h.register_forward_pre_hook(changing(model, lambda *_: None)) and None,
    "a subclass": lambda model: subclass(model, "", "hidden"),
    "a method of its own": lambda model: setattr(model, "hidden", changing(model, model.hidden)),
    "a patched class": lambda model: mock.patch.object(GPT2, "hidden", changing(model, GPT2.hidden)),
    "a LayerNorm's subclass": lambda model: subclass(model, "ln_f"),
    "an embedding's subclass": lambda model: subclass(model, "wte"),
    "a stack's subclass": lambda model: subclass(model, "h"),
    "a patched LayerNorm": lambda model: setattr(model.ln_f, "forward", changing(model, model.ln_f.forward)),
    "a mode": lambda model: Mode(model),
    "a parametrized embedding": lambda model: (
        parametrize.register_parametrization(model.wpe, "weight", Called(changing(model, nn.Identity()))) and FULL
    ),
}


class Mode(TorchFunctionMode):
    """One that changes a block when a largest and least value is asked for the fifth time."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.changing = changing(model, lambda: None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.aminmax:
            self.changing()
        return func(*args, **(kwargs or {}))


class Called(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("change", MEANWHILE.values(), ids=MEANWHILE)
@torch.no_grad()
def test_generate_sees_what_code_of_others_does_to_the_blocks_meanwhile(change: Callable[[Any], Any]) -> None:
    def streamed(model: GPT2, prompt: Tensor, n: int, **settings: Any) -> Tensor:
        return torch.cat([prompt, torch.stack([*stream(model, prompt, n, **settings)], dim=1)], dim=1)

    texts = []
    for run in (generate, streamed):
        model = made()
        with change(model) or nullcontext():
            texts.append(run(model, torch.arange(6).view(2, 3), 20, temperature=0))
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], generate(made(), torch.arange(6).view(2, 3), 20, temperature=0))


@pytest.mark.parametrize("training", ["", "h.1"])
@torch.no_grad()
def test_weights_that_move_and_modes_that_change_meanwhile_are_seen(
    looks: list[Any], monkeypatch: pytest.MonkeyPatch, training: str
) -> None:
    """As other threads may do it."""
    model, prompt = made(embd_pdrop=0.9, resid_pdrop=0.9), torch.arange(6).view(2, 3)
    wanted = generate(model, prompt, 20, temperature=0)
    drawn, decode = iter(range(100)), kernel.decode_blocks

    def meanwhile(*args: Any) -> Tensor:
        y = decode(*args)
        if next(drawn) == 4:
            model.h[1].mlp.c_proj.weight.share_memory_()
            model.get_submodule(training).train()
        return y

    monkeypatch.setattr(kernel, "decode_blocks", meanwhile)
    looks.clear()
    assert torch.equal(generate(model, prompt, 20, temperature=0), wanted)
    assert len(looks) == 2


@torch.no_grad()
def test_blocks_laid_out_serve_tokens_of_their_kind_only() -> None:
    model, x = made(), torch.randn(2, 1, 32)
    cache = KVCache(model, 2, 5)
    tensors: list[Tensor] = []
    for block, layer in zip(model.h, cache.layers, strict=True):
        tensors += [*(p.detach() for p in block.parameters()), layer.k, layer.v]
    laid_out = kernel.Blocks(tensors, 2, [(0.25, 1e-5, 1e-5)] * 2)
    assert laid_out.serve(x, 4)
    laid_out.tensors[3].share_memory_()
    assert not laid_out.serve(x, 4)
    laid_out.addresses[3] = laid_out.tensors[3].data_ptr()
    assert laid_out.serve(x, 4)
    assert not laid_out.serve(x, 5)
    for other in (x[:1], x.double(), x.bfloat16(), x.repeat(1, 2, 1), x[..., :16]):
        assert not laid_out.serve(other, 4), other.shape
    strided = torch.randn(2, 1, 64)[..., ::2]
    assert strided.shape == x.shape
    assert not laid_out.serve(strided, 4)
    assert not laid_out.serve(torch._neg_view(x), 4)


class Other(Projection):
    """A module of somebody else."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def reordered(mlp: nn.Module) -> nn.Module:
    first = mlp.c_fc
    del mlp.c_fc
    mlp.c_fc = first
    return mlp


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def swapped(module: nn.Module, kind: type[Any], *arguments: Any) -> nn.Module:
    """A module of another kind with the same parameters."""
    other: nn.Module = kind(*arguments).eval()
    other.load_state_dict(module.state_dict())
    return other


def hook(model: GPT2, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)


@contextmanager
def hook_of_all(model: GPT2) -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, args, out: 2 * out if isinstance(module, Projection) else None)
    try:
        yield
    finally:
        handle.remove()


def attribute(model: GPT2, name: str, value: Any) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, value)


def data(model: GPT2, name: str, change: Callable[[Tensor], Tensor]) -> None:
    parameter = model.get_parameter(name)
    parameter.data = change(parameter.data)


FULL = nullcontext()
Change = Callable[[GPT2], AbstractContextManager[Any] | None]
CHANGES: dict[str, Change] = {
    **{f"a hook on {n}": functools.partial(hook, name=n) for n in ("h.1", "h.0.attn", "h.1.mlp.c_fc", "h.0.ln_2")},
    "a hook before": lambda model: (
        model.h[1].attn.c_proj.register_forward_pre_hook(lambda m, args: (2 * args[0],)) and FULL
    ),
    "a hook of all modules": hook_of_all,
    "a forward of its own": lambda model: attribute(model, "h.1.mlp.forward", torch.neg),
    "a class with another forward": lambda model: mock.patch.object(MLP, "forward", lambda self, x: 2 * x),
    "parts in another order": lambda model: attribute(model, "h.0.mlp", reordered(model.h[0].mlp)),
    "a module of a subclass": lambda model: attribute(
        model, "h.0.attn.c_attn", swapped(model.h[0].attn.c_attn, Other, 32, 96)
    ),
    "an activation of others": lambda model: attribute(model, "h.0.mlp.act", torch.relu),
    "an activation that is a module": lambda model: attribute(model, "h.0.mlp.act", Doubled()),
    "a LayerNorm that is none": lambda model: attribute(model, "h.1.ln_1", Doubled()),
    "a parametrized weight": lambda model: (
        parametrize.register_parametrization(model.h[0].mlp.c_proj, "weight", Doubled()) and FULL
    ),
    "a module more": lambda model: model.h[0].attn.add_module("more", Doubled()),
    "sdpa": lambda model: attribute(model, "h.1.attn.backend", "sdpa"),
    "eager": lambda model: attribute(model, "h.0.attn.backend", "eager"),
    "training": lambda model: model.h[1].train() and FULL,
    "autocast": lambda model: torch.autocast("cpu"),
    "gradients": lambda model: torch.enable_grad(),
    "a mode": lambda model: FlopCounterMode(display=False),
    "columns": lambda model: data(model, "h.1.attn.c_proj.weight", lambda w: w.t().contiguous().t()),
    "a negative view": lambda model: data(model, "h.0.mlp.c_fc.bias", torch._neg_view),
    "float64": lambda model: model.double() and FULL,
    "no bias": lambda model: attribute(model, "h.0.ln_1.bias", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_block_that_is_more_than_its_operations_runs_as_it_is(calls: list[Any], change: Change) -> None:
    """A token by itself then gives what it gives in one pass with those before it, which never takes the one call."""
    model = made(attn_pdrop=0.0, resid_pdrop=0.0)
    ids = torch.randint(97, (2, 4), generator=torch.Generator().manual_seed(0))
    continued(model, ids, 3)
    assert len(calls) == 1
    with change(model) or nullcontext():
        found, _ = continued(model, ids, 3)
        exact = model(ids)
    assert len(calls) == 1
    torch.testing.assert_close(found.double(), exact.double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("shape", "B"), [({}, kernel.FEW + 1), ({"n_head": 3}, 2), ({"n_inner": 48}, 2)], ids=str)
@torch.no_grad()
def test_sizes_that_it_does_not_take(calls: list[Any], shape: Any, B: int) -> None:
    model, ids = made(**shape), torch.randint(97, (B, 4), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(continued(model, ids, 2)[0], model(ids), rtol=1e-4, atol=1e-4)
    assert not calls


SPOILT: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda t: None,
    "meta": lambda t: t.to("meta"),
    "double": lambda t: t.double(),
    "short": lambda t: t[:-1],
    "long": lambda t: torch.cat([t, t]),
    "flat": lambda t: t.flatten() if t.dim() > 1 else t[None],
    "one dimension more": lambda t: t[None],
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape) if t.numel() > 1 and t.size(0) > 1 else t[None],
    "sparse": lambda t: t.to_sparse(),
    "negative": torch._neg_view,
    "unaligned": lambda t: torch.frombuffer(bytearray(4 * t.numel() + 1), dtype=t.dtype, offset=1).view(t.shape),
    "a scalar": lambda t: t.sum(),
    "complex": lambda t: t.cfloat(),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@torch.no_grad()
def test_tensors_that_it_must_not_touch(spoil: Callable[[Tensor], Tensor | None]) -> None:
    """Each in its turn: of the token, of the second block's parameters and of its caches."""
    model, x = made(), torch.randn(2, 1, 32)
    cache = KVCache(model, 2, 5)
    sound: list[Any] = []
    for block, layer in zip(model.h, cache.layers, strict=True):
        sound += [*(p.detach() for p in block.parameters()), layer.k.normal_(), layer.v.normal_()]
    assert kernel.serves_blocks(x, sound, 2, 4)
    assert not kernel.serves_blocks(x, sound, 2, 5)
    assert not kernel.serves_blocks(x, sound, 2, -1)
    assert not kernel.serves_blocks(x, sound, 1, 4)
    assert not kernel.serves_blocks(x, sound[:-1], 2, 4)
    assert not kernel.serves_blocks(x, [], 2, 4)
    for i in range(14, 28):
        assert not kernel.serves_blocks(x, [*sound[:i], spoil(sound[i]), *sound[i + 1 :]], 2, 4), i
        assert not kernel.serves_blocks(x, [*sound[: i - 14], spoil(sound[i]), *sound[i - 13 :]], 2, 4), i
    spoilt = spoil(x)
    assert spoilt is None or not kernel.serves_blocks(spoilt, sound, 2, 4)


@torch.no_grad()
def test_layers_that_disagree_about_what_they_hold_are_not_written_in_one_call(calls: list[Any]) -> None:
    model, x = made(), torch.randn(1, 1, 32)
    cache = KVCache(model, 1, 4)
    model(torch.zeros(1, 2, dtype=torch.long), cache=cache)
    model.h(x, cache=cache)
    cache.layers[1].length -= 1
    model.h(x, cache=cache)
    assert len(calls) == 1
    assert [layer.length for layer in cache.layers] == [4, 3]
