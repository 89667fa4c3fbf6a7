"""Random calls of every operation against its plain form in float64: the error is at most twice that of the plain form
in the same dtype, or the call is refused in a way that is documented. Where attention's scores are in the hundreds, a
few pairs of them decide the plain form's error, by luck: what one more rounding of the operands does is allowed there.

Shapes, dtypes, layouts of memory, grad mode, autocast, the defaults of dtype and device, threads and the library of the
products are random. Run by hand: python tests/fuzz_ops.py --n 2000 --seed 0"""

from __future__ import annotations

import contextlib
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from fuzzing import Finding, main
from torch import Tensor, nn

from minigpt2.loss import linear_cross_entropy
from minigpt2.ops import kernel, products
from minigpt2.ops.attention import attention, causal_mask, masked_attention
from minigpt2.ops.attention.eager import eager_attention, merge_heads, split_heads
from minigpt2.ops.attention.fused import decode, dropout_mask, fused_attention
from minigpt2.ops.dropout import dropout_add
from minigpt2.ops.gelu import gelu
from minigpt2.ops.seed import draw_seed

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
REFUSALS = (
    r"fused attention is not available: ",
    r"decode has no gradient",
    r"(qkv|q) must be \(",
    r"the head size must be a multiple of 16 up to 256, not ",
    r"the tensors must have one dtype",
    r"Expected query, key, and value to have the same dtype",
    r"Inference tensors cannot be saved for backward",  # PyTorch's own
)
Function = Callable[..., Tensor]
Call = tuple[Function, Function, list[Tensor]]
"""An operation, its plain form, and what both are called with."""


class Subclass(torch.Tensor):
    """One that changes nothing."""


def size(rng: random.Random, *usual: int) -> int:
    return rng.choice([*usual, *usual, 0, 1, 2, 3, rng.randrange(1, 70)])


def laid_out(rng: random.Random, values: Tensor) -> Tensor:
    """The values in memory of some layout; where it is one that repeats them, some of the values."""
    layouts = ["offset", "apart", "swapped", "expanded", "negative", "unaligned", "inference", "subclass", "parameter"]
    layout, n = rng.choice([*["plain"] * 4, *layouts]), values.numel()
    dim = rng.randrange(values.dim()) if values.dim() else 0
    if layout == "offset":
        return torch.cat([values.new_zeros(5), values.flatten()])[5:].view_as(values)
    if layout == "apart" and values.dim():
        return torch.stack([values, values], dim + 1).flatten(dim, dim + 1).movedim(dim, 0)[::2].movedim(0, dim)
    if layout == "swapped" and values.dim() > 1:
        return values.transpose(dim, dim - 1).contiguous().transpose(dim, dim - 1)
    if layout == "expanded" and values.dim() and n:
        return values.narrow(dim, 0, 1).expand_as(values)
    if layout == "negative" and values.is_floating_point():
        return torch._neg_view(-values)
    if layout == "unaligned" and n:
        memory = bytearray(n * values.element_size() + 1)
        return torch.frombuffer(memory, dtype=values.dtype, offset=1).view_as(values).copy_(values)
    if layout == "inference":
        with torch.inference_mode():
            return values.clone()
    if layout == "subclass":
        return values.as_subclass(Subclass)
    return nn.Parameter(values) if layout == "parameter" and values.is_floating_point() else values.clone()


def tensor(rng: random.Random, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(rng.randrange(2**32))
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    made = laid_out(rng, values * rng.choice([1, 1, 1, 1e-3, 10]))
    if type(made) is Tensor and not made.is_inference():
        made = made.detach().requires_grad_(rng.random() < 0.6)
    return made


def seed_of_next_draw(x: Tensor) -> int:
    """That which an operation would draw for x, without drawing it."""
    state = torch.get_rng_state()
    seed = int(draw_seed(x))
    torch.set_rng_state(state)
    return seed


def attention_call(rng: random.Random, dtype: torch.dtype) -> Call:
    B, T, H = size(rng, 2), size(rng, 5, 65, 130), rng.choice([1, 2, 3])
    D = rng.choice([16, 32, 64, 80, 256, rng.randrange(1, 40)])
    qkv, backend = tensor(rng, B, T, 3 * H * D, dtype=dtype), rng.choice(["auto", "eager", "fused"])
    fused = backend == "fused" or (backend == "auto" and kernel.serves(qkv) and D % 16 == 0)
    backend = "eager" if backend == "auto" and not fused else backend  # it would be PyTorch's, whose error is larger
    p = rng.choice([0.0, 0.0, 0.1, 0.5, 1.0]) if fused else 0.0  # elsewhere the dropout is PyTorch's own
    seed = seed_of_next_draw(qkv) if p else None

    def plain(x: Tensor) -> Tensor:
        (q, k, v), mask = split_heads(x, H), causal_mask(T, T, x.device)
        if seed is None:
            return merge_heads(eager_attention(q, k, v, mask))
        weights = (q @ k.mT / D**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        weights = weights * dropout_mask(seed, B, H, T, p) / (1 - p) if p < 1 else weights * 0
        return merge_heads(weights @ v)

    if backend == "fused" and rng.random() < 0.5:
        return lambda x: fused_attention(x, H, dropout_p=p), plain, [qkv]
    return lambda x: attention(x, H, dropout_p=p, backend=backend), plain, [qkv]


def decode_call(rng: random.Random, dtype: torch.dtype) -> Call:
    B, T, H, D = size(rng, 2), size(rng, 5, 65, 200), rng.choice([1, 3]), rng.choice([16, 64, 80, 256, 20])
    q, k, v = (tensor(rng, B, H, n, D, dtype=dtype) for n in (rng.choice([1, 1, 1, 2]), T, T))
    if rng.random() < 0.1:
        k = tensor(rng, *k.shape, dtype=rng.choice(DTYPES))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return merge_heads(eager_attention(q, k, v, causal_mask(1, k.size(2), q.device)))

    if rng.random() < 0.5:
        return lambda *operands: masked_attention(*operands, None), plain, [q, k, v]
    return lambda *operands: merge_heads(decode(*operands)), plain, [q, k, v]


def dropout_call(rng: random.Random, dtype: torch.dtype) -> Call:
    shape = [size(rng, 3, 64, 100) for _ in range(rng.randrange(4))]
    operands = [tensor(rng, *shape, dtype=dtype)]
    if rng.random() < 0.7:
        operands.append(tensor(rng, *shape, dtype=rng.choice([dtype, dtype, *DTYPES])))
    p = rng.choice([0.0, 0.1, 0.5, 1.0]) if kernel.serves(operands[-1]) else 0.0
    factor = torch.ones(shape)
    if p:
        width = shape[-1] if shape else 1
        rows = factor.numel() // max(1, width)
        mask = dropout_mask(seed_of_next_draw(operands[0]), 1, 1, max(rows, width), p)[0, 0, :rows, :width]
        factor = mask.reshape(shape).double() / (1 - p) if p < 1 else factor * 0

    def plain(x: Tensor, residual: Tensor | None = None) -> Tensor:
        dropped = x * factor.to(x.dtype)
        return dropped if residual is None else residual + dropped.to(residual.dtype)

    return lambda x, residual=None: dropout_add(x, residual, p), plain, operands


def gelu_call(rng: random.Random, dtype: torch.dtype) -> Call:
    shape = [size(rng, 3, 64, 500) for _ in range(rng.randrange(4))]
    return gelu, lambda x: F.gelu(x, approximate="tanh"), [tensor(rng, *shape, dtype=dtype)]


def product_call(rng: random.Random, dtype: torch.dtype) -> Call:
    n, inner, out = size(rng, 1, 4, 8, 9), size(rng, 16, 64, 96), size(rng, 32, 64, 96)
    x, w, b = (tensor(rng, *shape, dtype=dtype) for shape in ((n, inner), (inner, out), (out,)))
    if rng.random() < 0.5:
        return products.project, lambda x, w, b: torch.addmm(b, x, w), [x, w, b]

    def added(x: Tensor, w: Tensor) -> Tensor:
        to = torch.full((n, out), torch.nan, dtype=x.dtype, device="cpu")
        products.add_transposed_product(to, x.mT, w, first=True)
        products.add_transposed_product(to, x.mT, w, first=False)
        return to / 2

    without_gradient: list[Function] = [
        lambda x, w: products.project_transposed(x, w.mT),
        products.multiply,
        lambda x, w: products.weight_gradient(x.mT, w),
        added,
    ]
    return rng.choice(without_gradient), torch.mm, [x.detach(), w.detach()]


def loss_call(rng: random.Random, dtype: torch.dtype) -> Call:
    shape = [size(rng, 3, 9) for _ in range(rng.choice([1, 2]))]
    width, vocabulary = size(rng, 16), rng.randrange(1, 90)
    hidden, weight = tensor(rng, *shape, width, dtype=dtype), tensor(rng, vocabulary, width, dtype=dtype)
    generator = torch.Generator("cpu").manual_seed(rng.randrange(2**32))
    targets = torch.randint(vocabulary, shape, generator=generator, dtype=rng.choice([torch.int64, torch.int32]))
    ignored = torch.rand(shape, generator=generator) < rng.choice([0, 0.3])
    labels = targets.masked_fill(ignored, -100)
    targets = laid_out(rng, labels)
    if targets.numel():  # a layout may have repeated some of them
        labels = torch.tensor(targets.tolist())
    reduction, chunk = rng.choice(["mean", "sum", "none"]), rng.choice([None, 1, 4])

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).reshape(-1, vocabulary)
        loss = F.cross_entropy(logits, labels.reshape(-1).long(), reduction=reduction)
        return loss.view(shape) if reduction == "none" else loss

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk_size=chunk)

    return ours, plain, [hidden, weight]


CALLS = (attention_call, attention_call, decode_call, dropout_call, gelu_call, product_call, product_call, loss_call)


@contextlib.contextmanager
def surroundings(rng: random.Random) -> Iterator[None]:
    """Modes and defaults that are none of an operation's business, or change its precision only."""
    onednn = rng.random() < 0.5 and torch.backends.mkldnn.is_available()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.float32)
        stack.callback(torch.set_default_device, None)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(rng.choice([1, 2, 3]))
        stack.enter_context(mock.patch.multiple(products, _onednn_is_faster=lambda: onednn, ONEDNN_LEAST=1))
        stack.enter_context(rng.choice([torch.enable_grad, torch.enable_grad, torch.no_grad, torch.inference_mode])())
        if rng.random() < 0.2:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        torch.set_default_dtype(rng.choice(DTYPES))
        torch.set_default_device(rng.choice([None, "meta"]))
        yield


def outcome(function: Function, operands: list[Tensor], seed: int) -> list[Tensor]:
    """The result, and the gradients of the operands that want one."""
    out = function(*operands)
    wanted = [t for t in operands if t.requires_grad] if out.requires_grad and torch.is_grad_enabled() else []
    if not wanted:
        return [out.detach()]
    generator = torch.Generator("cpu").manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, device="cpu", dtype=torch.float64)
    grad = laid_out(random.Random(seed), grad.to(torch.bfloat16).to(out.dtype))  # the same values in each dtype
    grad = grad.clone() if grad.is_inference() else grad.detach()
    return [out.detach(), *torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True)]


def attempt(function: Function, operands: list[Tensor], seed: int) -> list[Tensor] | Exception:
    state = torch.get_rng_state()
    try:
        return outcome(function, operands, seed)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:  # and no others
        return error
    finally:
        torch.set_rng_state(state)


def spoil(rng: random.Random, dtype: torch.dtype) -> Tensor:
    """An operand that no operation expects: all is well if it is refused, or if nothing else happens."""
    shape = [size(rng, 16, 96) for _ in range(rng.randrange(5))]
    made = tensor(rng, *shape[: rng.choice([2, 3, 5])], dtype=rng.choice([dtype, *DTYPES]))
    others = [made, made.detach().long(), made.detach() > 0, made.detach().to("meta"), made.detach().cfloat()]
    if made.dim() == 2 and type(made) is Tensor:
        others.append(made.detach().clone().to_sparse())
    return rng.choice(others)


def distance(found: Tensor, exact: Tensor) -> float:
    return (found.as_subclass(Tensor).double() - exact).norm().item()


def nudged(operands: list[Tensor], eps: float) -> list[Tensor]:
    """The operands, each element of them larger or smaller by one rounding error."""
    generator = torch.Generator("cpu").manual_seed(0)
    signs = [torch.randint(2, t.shape, generator=generator, device="cpu") * 2 - 1 for t in operands]
    return [(t * (1 + eps * s)).detach().requires_grad_(t.requires_grad) for t, s in zip(operands, signs, strict=True)]


def case(rng: random.Random, counts: Counter[str]) -> None:
    make, dtype = rng.choice(CALLS), rng.choice([torch.float32, *DTYPES])
    torch.manual_seed(rng.randrange(2**32))
    ours, plain, operands = make(rng, dtype)
    seed, name, spoilt = rng.randrange(2**32), make.__name__.removesuffix("_call"), rng.random() < 0.1
    if spoilt:
        operands[rng.randrange(len(operands))] = spoil(rng, dtype)
    what = f"{name} of {[(str(t.dtype), tuple(t.shape), t.stride(), type(t).__name__) for t in operands]}"
    with surroundings(rng), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a slower path, and that a non-leaf tensor has no .grad
        found, same = attempt(ours, operands, seed), attempt(plain, operands, seed)
    if spoilt:
        counts[f"{name}, spoilt, {'refused' if isinstance(found, Exception) else 'served'}"] += 1
        return
    if isinstance(found, Exception):
        if not isinstance(same, Exception) and not re.match("|".join(REFUSALS), str(found)):
            raise Finding(f"{what} is refused: {type(found).__name__}: {found}")
        counts[f"{name}, refused"] += 1
        return
    if isinstance(same, Exception):
        counts[f"{name}, without a plain form"] += 1
        return
    wide = [t.detach().as_subclass(Tensor).clone().double().requires_grad_(t.requires_grad) for t in operands]
    exact = outcome(plain, wide, seed) if len(same) > 1 else [plain(*wide).detach()]
    # What is 0 in exact arithmetic is known to the rounding of the rest; and in float64, or where it cancels, the plain
    # form is known no better.
    rest = [*exact, *wide] if name == "gelu" or found[0].dtype == torch.float64 else exact
    scale = max((t.norm().item() for t in rest if t.isfinite().all()), default=0.0)
    eps = max(torch.finfo(t.dtype).eps for t in (*found, *same, *operands))
    moved = exact
    if name in ("attention", "decode"):
        near = nudged(wide, eps)
        moved = outcome(plain, near, seed) if len(same) > 1 else [plain(*near).detach()]
    for i, (a, b, e, near_e) in enumerate(zip(found, same, exact, moved, strict=True)):
        which = f"gradient {i - 1}" if i else "the result"
        if a.shape != e.shape:
            raise Finding(f"{what}: {which} has the shape {tuple(a.shape)}, not {tuple(e.shape)}")
        if not b.isfinite().all() or not e.isfinite().all():
            continue
        allowed = 2 * distance(b, e) + (64 if a.dtype == torch.float64 else 4) * eps * scale + distance(near_e, e)
        if not distance(a, e) <= allowed:
            raise Finding(
                f"{what}: {which} is {distance(a, e):.3g} off, the plain one {distance(b, e):.3g} of {scale:.3g}"
            )
    counts[name] += 1


if __name__ == "__main__":
    main(case)
