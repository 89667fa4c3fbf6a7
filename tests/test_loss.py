"""The chunked loss against the plain one: F.cross_entropy over F.linear."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from minigpt2 import GPT2, GPT2Config
from minigpt2.loss import _chunked, chunk_shape, linear_cross_entropy

N, C, V = 23, 8, 101  # primes where it matters: no chunk size divides N, no padding is needed by chance
REDUCTIONS = ["mean", "sum", "none"]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", ignore_index: int = -100) -> Tensor:
    logits = F.linear(hidden, weight).reshape(-1, len(weight))
    loss = F.cross_entropy(logits, targets.flatten(), reduction=reduction, ignore_index=ignore_index)
    return loss.view(targets.shape) if reduction == "none" else loss


def inputs(*shape: int, dtype: torch.dtype = torch.float64, ignored: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, shape, generator=g)
    if ignored:
        targets.view(-1)[::3] = -100
    return hidden, weight, targets


def value_and_gradients(f: Callable[..., Tensor], data: tuple[Tensor, Tensor, Tensor], **options: Any) -> list[Tensor]:
    loss = f(*data, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, data[:2], upstream)]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 12, N, 1000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_plain_form(reduction: str, chunk_size: int | None) -> None:
    data = inputs(N)
    actual = value_and_gradients(linear_cross_entropy, data, reduction=reduction, chunk_size=chunk_size)
    assert_equal(actual, value_and_gradients(plain, data, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batches_ignored_words_and_no_tokens(reduction: str) -> None:
    for data, ignore in [
        (inputs(2, 3, 4), -100),
        (inputs(N, ignored=False), 7),
        (inputs(0), -100),
        (inputs(ignored=False), -100),
        (inputs(1, ignored=False), -100),
    ]:
        options = {"reduction": reduction, "ignore_index": ignore}
        assert_equal(
            value_and_gradients(linear_cross_entropy, data, **options), value_and_gradients(plain, data, **options)
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored(reduction: str) -> None:
    hidden, weight, targets = inputs(N)
    data = (hidden, weight, torch.full_like(targets, -100))
    loss, *gradients = value_and_gradients(linear_cross_entropy, data, reduction=reduction, chunk_size=5)
    assert_equal([loss, *gradients], value_and_gradients(plain, data, reduction=reduction))
    assert loss.isnan() if reduction == "mean" else not loss.any()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_improbable_labels_stay_finite(reduction: str) -> None:
    hidden, weight, targets = inputs(N, dtype=torch.float32)
    data = ((hidden.detach() * 200).requires_grad_(), weight, targets)
    actual = value_and_gradients(linear_cross_entropy, data, reduction=reduction, chunk_size=5)
    assert actual[0].max() > 500
    assert all(t.isfinite().all() for t in actual)
    assert_equal(actual, value_and_gradients(plain, data, reduction=reduction), 1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    hidden, weight, _ = inputs(4)
    weight, targets = weight.detach()[:9].clone().requires_grad_(), torch.tensor([8, -100, 0, 3])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction, chunk_size=3), (hidden, weight)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_requires_a_gradient(reduction: str, wanted: tuple[bool, bool]) -> None:
    hidden, weight, targets = inputs(N)
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    losses = [f(hidden, weight, targets, reduction=reduction) for f in (linear_cross_entropy, plain)]
    assert_equal(losses[:1], losses[1:])
    assert losses[0].requires_grad == any(wanted)
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    if leaves:
        actual, expected = (list(torch.autograd.grad(loss.sum(), leaves)) for loss in losses)
        assert_equal(actual, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_graph_walked_twice_and_no_second_derivative(reduction: str) -> None:
    hidden, weight, targets = inputs(N)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum() * 3
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    assert_equal(list(torch.autograd.grad(loss, (hidden, weight))), list(first), 0)


def test_accumulation_and_a_tied_embedding() -> None:
    hidden, weight, targets = inputs(N)
    gradients = []
    for f in (linear_cross_entropy, plain):
        tied = weight.detach().clone().requires_grad_()
        for scale in (1.0, 1024.0):  # micro-steps, the second as a loss scaler would have it
            (f(F.embedding(targets.clamp(min=0), tied) + hidden.detach(), tied, targets) * scale).backward()
        assert tied.grad is not None
        gradients.append(tied.grad)
    assert_equal(gradients[:1], gradients[1:])


def test_functional_call() -> None:
    class Head(torch.nn.Linear):
        def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
            assert targets is not None
            return linear_cross_entropy(hidden, self.weight, targets)

    hidden, weight, targets = inputs(N)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return torch.func.functional_call(Head(C, V, bias=False), {"weight": weight}, (hidden, targets))

    assert_equal(
        value_and_gradients(call, (hidden, weight, targets)), value_and_gradients(plain, (hidden, weight, targets))
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_as_good_as_the_plain_form(autocast: bool, reduction: str) -> None:
    g = torch.Generator().manual_seed(1)
    kind = torch.float32 if autocast else torch.bfloat16
    hidden = torch.randn(256, 64, generator=g).to(kind).requires_grad_()
    weight = (torch.randn(997, 64, generator=g) * 0.2).to(kind).requires_grad_()
    targets = torch.randint(0, 997, (256,), generator=g)
    data = (hidden, weight, targets)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = value_and_gradients(plain, (exact[0], exact[1], targets), reduction=reduction)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = value_and_gradients(linear_cross_entropy, data, reduction=reduction, chunk_size=100)
        theirs = value_and_gradients(plain, data, reduction=reduction)
    assert ours[0].dtype == torch.float32
    assert [t.dtype for t in ours[1:]] == [kind, kind]
    for a, b, truth in zip(ours, theirs, expected, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_memory_held_before_does_not_matter(dtype: torch.dtype) -> None:
    hidden = torch.randn(100, 64).to(dtype).requires_grad_()
    weight = torch.randn(997, 64).to(dtype).requires_grad_()
    torch.use_deterministic_algorithms(True)  # with which PyTorch fills new memory with NaN
    try:
        assert torch.empty(1, dtype=dtype).isnan().all()
        found = value_and_gradients(linear_cross_entropy, (hidden, weight, torch.arange(100)), chunk_size=64)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_int32_targets(reduction: str) -> None:
    hidden, weight, targets = inputs(2, 7)
    expected = value_and_gradients(linear_cross_entropy, (hidden, weight, targets), reduction=reduction)
    narrow = hidden, weight, targets.int()
    assert_equal(value_and_gradients(linear_cross_entropy, narrow, reduction=reduction), expected, 0)
    narrow[2][0, 1] = V
    with pytest.raises(ValueError, match=rf"target {V} is neither"):
        linear_cross_entropy(*narrow)


def test_the_loss_of_a_model_takes_int32_as_it_takes_int64() -> None:
    model = GPT2(GPT2Config(vocab_size=V, n_positions=8, n_embd=16, n_layer=1, n_head=1)).eval()
    ids = torch.arange(16).view(2, 8)
    targets = torch.where(ids % 3 > 0, ids + 1, -100)
    expected = [model.loss(ids, targets, reduction=reduction) for reduction in REDUCTIONS]
    for narrow in ((ids.int(), targets), (ids, targets.int()), (ids.int(), targets.int())):
        assert_equal([model.loss(*narrow, reduction=reduction) for reduction in REDUCTIONS], expected, 0)
    with pytest.raises(TypeError, match=r"targets must be int64 or int32 token ids, not torch.float32"):
        model.loss(ids, targets.float())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch.nn.functional has it from torch 2.13 on")
@pytest.mark.parametrize("ignore_index", [-100, 7])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_pytorchs_own(reduction: str, ignore_index: int) -> None:
    hidden, weight, targets = inputs(N, ignored=ignore_index < 0)
    targets[4:6] = ignore_index

    def theirs(hidden: Tensor, weight: Tensor, targets: Tensor, **settings: Any) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5)  # type: ignore[attr-defined]
        return F.linear_cross_entropy(hidden, weight, targets, options=options, **settings)  # type: ignore[attr-defined]

    settings = {"reduction": reduction, "ignore_index": ignore_index}
    actual = value_and_gradients(linear_cross_entropy, (hidden, weight, targets), chunk_size=5, **settings)
    assert_equal(actual, value_and_gradients(theirs, (hidden, weight, targets), **settings))


def sum_of_losses(f: Callable[..., Tensor], reduction: str) -> Callable[..., Tensor]:
    return lambda hidden, weight, targets: f(hidden, weight, targets, reduction=reduction).sum()


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: torch.func.grad(f, argnums=(0, 1)),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1)),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(0, 1)),
    "hessian": lambda f: torch.func.hessian(f),
    "jvp": lambda f: lambda h, w, t: torch.func.jvp(lambda h, w: f(h, w, t), (h, w), (h.cos(), w.sin())),
    "vmap": lambda f: lambda h, w, t: torch.vmap(f, (0, None, 0))(h[:, None], w, t[:, None]),
    "gradients of samples": lambda f: (
        lambda h, w, t: torch.vmap(torch.func.grad(f, argnums=1), (0, None, 0))(h[:, None], w, t[:, None])
    ),
    "jit.trace": lambda f: lambda h, w, t: torch.jit.trace(f, (h[:3], w, t[:3]))(h, w, t),
    "make_fx": lambda f: lambda h, w, t: make_fx(f)(h, w, t)(h.flip(0), w, t.flip(0)),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_transforms(transform: str, reduction: str) -> None:
    hidden, weight, targets = inputs(4, ignored=reduction != "mean")
    data = hidden.detach(), weight.detach(), targets
    ours, theirs = (sum_of_losses(f, reduction) for f in (linear_cross_entropy, plain))
    torch.testing.assert_close(TRANSFORMS[transform](ours)(*data), TRANSFORMS[transform](theirs)(*data))


def test_forward_mode() -> None:
    hidden, weight, targets = inputs(N)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        tangents = [forward_ad.unpack_dual(f(dual, weight, targets)).tangent for f in (linear_cross_entropy, plain)]
    assert tangents[1] is not None
    torch.testing.assert_close(*tangents)


def test_targets_outside_the_vocabulary() -> None:
    hidden, weight, targets = inputs(N)
    for wrong in (V, -1, -101):
        targets[4] = wrong
        with pytest.raises(ValueError, match=rf"target {wrong} is neither in \[0, {V}\)"):
            linear_cross_entropy(hidden, weight, targets)


def test_arguments_that_do_not_fit() -> None:
    hidden, weight, targets = inputs(N)
    cases: list[tuple[type[Exception], str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = [
        (ValueError, "reduction", (hidden, weight, targets), {"reduction": "max"}),
        (ValueError, "chunk_size", (hidden, weight, targets), {"chunk_size": 0}),
        (ValueError, r"\(23, 8\), \(101, 8\), \(22,\)", (hidden, weight, targets[1:]), {}),
        (ValueError, "fit together", (hidden, weight[:, 1:], targets), {}),
        (TypeError, "targets must be int64 or int32 token ids, not torch.float64", (hidden, weight, hidden[:, 0]), {}),
        (TypeError, "not torch.int16", (hidden, weight, targets.short()), {}),
        (ValueError, "on one device, not on cpu, cpu, meta", (hidden, weight, targets.to("meta")), {}),
        (ValueError, "on one device, not on meta, cpu, cpu", (hidden.to("meta"), weight, targets), {}),
        (TypeError, "float64 but weight is torch.float32", (hidden, weight.float(), targets), {}),
    ]
    for error, match, arguments, options in cases:
        with pytest.raises(error, match=match):
            linear_cross_entropy(*arguments, **options)


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most memory that torch held at once above what it held at the start, while `step` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return int(held.max())


def test_memory_is_the_gradients_and_one_chunk() -> None:
    tokens, width, vocab, size = 400, 16, 5000, 20
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    gradients, chunk = 4 * (tokens + vocab) * width, 4 * size * 5056  # rows padded to a multiple of 64
    small = 4 * tokens * 16  # losses, labels, one (n, C) product

    def step(reduction: str = "mean") -> None:
        linear_cross_entropy(hidden, weight, targets, chunk_size=size, reduction=reduction).sum().backward()
        hidden.grad = weight.grad = None

    assert gradients + chunk <= peak_bytes(step) <= gradients + chunk + small
    assert gradients + chunk <= peak_bytes(lambda: step("none")) <= gradients + chunk + small
    with torch.no_grad():
        peak = peak_bytes(lambda: linear_cross_entropy(hidden, weight, targets, chunk_size=size))
    assert chunk <= peak <= chunk + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 31, 33, 342, 666, 4096, 8191])
@pytest.mark.parametrize("most", [None, 1, 7, 32, 100, 5000])
def test_a_chunk_is_as_long_as_asked_and_as_products_want_it(tokens: int, most: int | None, dtype: torch.dtype) -> None:
    rows, width = chunk_shape(tokens, 50257, most, dtype)
    size, fitting = (2, 521) if dtype == torch.bfloat16 else (4, 333)
    assert rows == tokens if tokens <= (most or fitting) else rows % 32 == 0 or (most and rows <= most < 64)
    assert rows <= (most or tokens)
    assert rows * width * size <= (50 if size == 2 else 64) * 2**20 or most
    assert (width - 50257, width % 64) == (47, 0)


@pytest.mark.parametrize("chunk_size", [None, 40, 1000])
def test_other_lengths_are_compiled_once(chunk_size: int | None) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(lambda *data: linear_cross_entropy(*data, chunk_size=chunk_size), backend=counter)
    try:
        for n in (23, 50, 90, 200):
            data = inputs(n)
            assert_equal([compiled(*data)], [linear_cross_entropy(*data, chunk_size=chunk_size)])
    finally:
        torch.compiler.reset()
    assert 1 <= counter.frame_count <= 2  # the first length by itself, then any


def test_the_weight_gradient_becomes_grad_without_a_copy() -> None:
    hidden, weight, targets = inputs(N)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    assert sorted(t.shape for t in saved) == sorted([hidden.shape, weight.shape])
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() in [t.data_ptr() for t in saved]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operator_registration(reduction: str) -> None:
    hidden, weight, targets = inputs(N)
    total = reduction != "none"
    torch.library.opcheck(_chunked, (hidden, weight, targets, None, -100, 5, torch.float64, total, total, total))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend: str) -> None:
    data = inputs(N, dtype=torch.float32)
    for reduction in REDUCTIONS if backend == "aot_eager" else ["mean"]:
        torch.compiler.reset()

        def f(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = reduction) -> Tensor:
            return linear_cross_entropy(hidden * 2, weight, targets, reduction=reduction, chunk_size=5) * 3

        compiled = torch.compile(f, fullgraph=True, backend=backend)
        assert_equal(value_and_gradients(compiled, data), value_and_gradients(f, data), 1e-6)
        if backend == "inductor":
            continue  # one compilation is slow enough, and shows what can differ: the memory that it reuses
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(value_and_gradients(compiled, data), value_and_gradients(f, data), 1e-6)
        with torch.no_grad():
            assert_equal([compiled(*data)], [f(*data)], 1e-6)
