"""The model's matrix products: which library makes them.

torch.addmm and torch.mm serve everything; bfloat16 they hand to oneDNN themselves, which takes the best instructions
that the processor has (AMX, AVX512_BF16, or float32's). Four cases on a CPU have something faster:

- *float32 on AMD's Zen 5.* torch.mm is MKL's, which takes its AVX-512 code on Intel's processors only and half of the
  vector units lie idle. oneDNN, which is a part of PyTorch too, uses them: products of training then take half of the
  time (`minigpt2 bench step` says what each reaches). On processors without AVX-512 MKL was the faster one.
- *bfloat16 on AMX.* The compiled kernel (csrc/matmul.cpp) reads float32 weights as they are, which saves their casts,
  and sums the gradients of weights in float32. It keeps five of the unit's eight tiles in use; with all of them, as
  oneDNN has it, the virtual Xeon that this was measured on is half as fast most of the time (csrc/tiles.h).
- *bfloat16 where the processor multiplies it otherwise.* torch.addmm first fills the product with the bias, for oneDNN
  to read again; oneDNN adds a bias itself. `minigpt2 bench step --precision bf16` says how much of a step the products
  by torch.mm would take.
- *Few rows* of float32 or bfloat16, as in generation, where the time goes into reading the weights. The compiled kernel
  (csrc/products.cpp) reads them nearer to the rate of memory than a general product does (`minigpt2 bench generate`
  says how near).

The choice depends on the processor and on sizes alone: it is the same in every run on a machine.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minigpt2.ops import kernel
from minigpt2.ops.checks import lse_dtype
from minigpt2.torch_private import has_onednn, onednn_linear, onednn_weight_gradient, transformed

__all__ = [
    "TiledProducts",
    "add_transposed_product",
    "bfloat16_unit",
    "explain_products",
    "multiply",
    "onednn_serves",
    "project",
    "project_transposed",
    "tiles_multiply",
    "weight_gradient",
]

ONEDNN_LEAST = 1 << 24  # multiplications in a product; below, what a call costs outweighs what it gains
MANY = 256  # rows of x with which a product that casts the weight takes no longer than one with a cast that is kept
BLOCK = 4064  # rows of a sum of products that are added at a time: 12 MiB stay in the cache


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias, for x (n, in), weight (in, out) and bias (out): (n, out)."""
    if _few_rows_serve(x, weight, bias):
        return kernel.few_rows_as_they_are(x, weight, bias)
    if not x.dim() == weight.dim() == 2:
        return torch.addmm(bias, x, weight)
    if not (x.size(1) == weight.size(0) > 0 and bias.shape == weight.shape[1:]):
        return torch.addmm(bias, x, weight)  # or its error
    keeps_casts = torch.is_autocast_cache_enabled() and not torch.is_grad_enabled()
    casts_itself = x.size(0) >= MANY and tiles_multiply(x.size(0) * weight.numel())
    alike = x.dtype == weight.dtype == bias.dtype
    if _autocast_serves(x, weight, bias) and (casts_itself or not keeps_casts):
        x = x.to(torch.get_autocast_dtype("cpu"))
    elif not (_plain(x, weight, bias) or (alike and tiles_serve(x, weight, bias))):
        return torch.addmm(bias, x, weight)

    def product() -> Tensor:
        if tiles_serve(x, weight, bias):
            return _by_tiles(x, weight, bias)
        if bfloat16_serves(x):
            # Autocast would keep the weight's cast for the backward pass, beside the weight.
            return onednn_linear(x, weight.to(x.dtype).t(), bias.to(x.dtype).contiguous())
        if onednn_serves(x.size(0) * weight.numel(), x, weight, bias):
            return onednn_linear(x, weight.t(), bias.contiguous())  # it takes the elements of another for granted
        return torch.addmm(bias, x, weight)

    if not torch.is_grad_enabled():
        return product()
    out: Tensor = _Filled.apply(_Kept.apply(x, weight, bias), product)
    return out


def project_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T, for x (n, in) and weight (out, in): (n, out). Without a gradient."""
    if _few_rows_serve(x, weight, None):
        return kernel.few_rows_as_they_are(x, weight, None)
    return torch.mm(x, weight.t())


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, for a (n, k) and b (k, m): (n, m), contiguous. Without a gradient. A float32 b is cast to bfloat16 for a
    bfloat16 a."""
    if tiles_serve(a, b):
        return _by_tiles(a, b)
    b = b.to(a.dtype)
    if onednn_serves(a.size(0) * b.numel(), a, b):
        return onednn_linear(a, b.t(), None)
    return torch.mm(a, b)


def add_transposed_product(to: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """to += a^T @ b, or to = a^T @ b where it is the `first` to be added; a (k, n), b (k, m), to (n, m).

    A `to` of higher precision takes the sum as it is; each product may be rounded to the dtype of a and b.
    """
    if to.dtype == torch.float32 and tiles_serve(a.t(), b):
        kernel.matmul(a.t(), b, out=to, add=not first)
        return
    onednn = onednn_serves(to.numel() * a.size(0), to, a, b)
    if not onednn and to.dtype == a.dtype:
        to.addmm_(a.t(), b, beta=float(not first))  # beta = 0: the memory is yet unwritten
        return
    for rows in range(0, to.size(0), BLOCK):
        target = to[rows : rows + BLOCK]
        left = a[:, rows : rows + BLOCK].t()
        (target.copy_ if first else target.add_)(onednn_linear(left, b.t(), None) if onednn else torch.mm(left, b))


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """x^T @ grad, for x (n, in) and grad (n, out): (in, out), the gradient of a weight. Without a gradient. That of
    bfloat16 operands is float32 on AMX, and elsewhere rounded to bfloat16."""
    if tiles_serve(x.t(), grad):
        return _by_tiles(x.t(), grad, exact=True)
    if not onednn_serves(x.numel() * grad.size(1), x, grad):
        return torch.mm(x.t(), grad)
    return onednn_weight_gradient(x, grad)


def explain_products() -> str:
    """One line: which library makes the float32 products of training on this CPU, and why."""
    return "oneDNN's (AMD's Zen 5)" if onednn_serves(ONEDNN_LEAST) else "torch.mm's"


# oneDNN, and bfloat16.


def bfloat16_serves(*operands: Tensor) -> bool:
    """Whether these are bfloat16 tensors on the CPU as they seem, which oneDNN multiplies as such here."""
    return (
        _as_they_seem(*operands)
        and all(t.dtype == torch.bfloat16 for t in operands)
        and not transformed()
        and bool(torch.backends.mkldnn.enabled)
        and _bfloat16_unit_to_use() is not None
    )


@functools.cache
def _bfloat16_unit_to_use() -> str | None:
    """With which of the processor's units oneDNN multiplies bfloat16, without trying, which recomputation would take
    for an operation of the model's. What it is kept from, the kernel does not use either."""
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    limited = limit not in ("", "ALL", "DEFAULT")
    if not has_onednn() or (limited and not limit.startswith(("AVX512", "AVX10"))):
        return None
    unit = bfloat16_unit()
    return "avx512_bf16" if unit and limited and "AMX" not in limit else unit


def tiles_serve(a: Tensor, b: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the compiled kernel is to make a @ b + bias, on AMX: for a (n, k), bfloat16, b (k, m) and bias that or
    float32."""
    others = (b,) if bias is None else (b, bias)
    return (
        a.dtype == torch.bfloat16
        and bfloat16_serves(a)
        and _as_they_seem(*others)
        and all(t.dtype in (torch.bfloat16, torch.float32) for t in others)
        and tiles_multiply(a.numel() * b.size(1))
    )


def tiles_multiply(multiplications: int) -> bool:
    """Whether the compiled kernel is to make a product of this size, of plain bfloat16 tensors on the CPU."""
    return (
        (not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == torch.bfloat16)
        and multiplications >= ONEDNN_LEAST
        and bool(torch.backends.mkldnn.enabled)
        and _bfloat16_unit_to_use() == "amx_bf16"
        and kernel.tiles()
    )


def _by_tiles(a: Tensor, b: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    product: Tensor = torch.ops.minigpt2.matmul(a, b, bias, exact)
    return product


def _matmul(a: Tensor, b: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
    return kernel.matmul(a, b, bias, dtype=torch.float32 if exact else torch.bfloat16)


def _matmul_add(addend: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    return kernel.matmul(a, b, addend=addend, alpha=alpha, beta=beta)


class TiledProducts(TorchFunctionMode):
    """Inside, products of bfloat16 matrices that others make are made by the compiled kernel, on AMX, if no gradient is
    asked for: those of `torch.optim.Muon`, which are most of its time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = _PRODUCTS.get(func) == len(args) and all(type(t) is Tensor and t.dim() == 2 for t in args)
        if known and kwargs.keys() <= {"alpha", "beta"} and not torch.is_grad_enabled() and bfloat16_serves(*args):
            *addend, a, b = args
            if a.size(1) == b.size(0) and tiles_serve(a, b):
                if not addend and not kwargs:
                    return _by_tiles(a, b)
                if addend and addend[0].shape == (a.size(0), b.size(1)):
                    return torch.ops.minigpt2.matmul_add(*args, **kwargs)
        return func(*args, **kwargs)


_PRODUCTS: dict[Any, int] = {torch.matmul: 2, torch.mm: 2, Tensor.matmul: 2, torch.addmm: 3}
"""What TiledProducts serves, and how many matrices each takes."""


# Operations, so that a recomputation can keep a product, and whoever looks at operations sees these.
torch.library.define("minigpt2::matmul", "(Tensor a, Tensor b, Tensor? bias, bool exact) -> Tensor")
torch.library.define(
    "minigpt2::matmul_add", "(Tensor addend, Tensor a, Tensor b, *, float beta=1, float alpha=1) -> Tensor"
)
torch.library.define("minigpt2::column_sums", "(Tensor x) -> Tensor")
torch.library.impl("minigpt2::matmul", "CPU", _matmul)
torch.library.impl("minigpt2::matmul_add", "CPU", _matmul_add)
torch.library.impl("minigpt2::column_sums", "CPU", kernel.column_sums)
torch.library.register_fake("minigpt2::matmul_add", lambda addend, *_, **__: addend.new_empty(addend.shape))
torch.library.register_fake("minigpt2::column_sums", lambda x: x.new_empty(x.size(1), dtype=lse_dtype(x.dtype)))
torch.library.register_fake(
    "minigpt2::matmul",
    lambda a, b, _, exact: a.new_empty((a.size(0), b.size(1)), dtype=torch.float32 if exact else a.dtype),
)


@functools.cache
def _onednn_is_faster() -> bool:
    info = Path("/proc/cpuinfo")
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and has_onednn()
        and info.exists()
        and _is_zen_5(info.read_text())
    )


def _is_zen_5(info: str) -> bool:
    """Whether a /proc/cpuinfo is that of AMD's Zen 5, whose AVX-512 units are the first of AMD's to be 512 bits wide,
    or of a later one."""
    family = re.search(r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)$", info, re.MULTILINE)
    return family is not None and int(family[1]) >= 26


def onednn_serves(multiplications: int, *operands: Tensor) -> bool:
    """Whether oneDNN is to make a product of this size: of these operands, or, without any, of plain float32 tensors on
    the CPU. torch.backends.mkldnn.enabled = False keeps it from all."""
    return (
        _plain(*operands)  # first, since a compiler cannot trace the rest
        and multiplications >= ONEDNN_LEAST
        and _onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


def _plain(*operands: Tensor) -> bool:
    """Whether these are float32 tensors on the CPU as they seem: not compiled, not transformed, not of a
    subclass, not under autocast."""
    return (
        _as_they_seem(*operands)
        and all(t.dtype == torch.float32 for t in operands)
        and not torch.is_autocast_enabled("cpu")
        and not transformed()
    )


def _autocast_serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether autocast is to cast float32 parameters on the CPU for a product with x, whose gradients are then made
    here."""
    return (
        _as_they_seem(x, *parameters)
        and all(t.dtype == torch.float32 for t in parameters)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and torch.is_autocast_enabled("cpu")
        and not transformed()
    )


def _as_they_seem(*operands: Tensor) -> bool:
    return not torch.compiler.is_compiling() and all(
        type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.layout is torch.strided for t in operands
    )


class _Kept(torch.autograd.Function):
    """The backward pass of x @ weight + bias, where a weight may be wider than x. Its forward returns a tensor of
    the product's shape without memory of its own, which _Filled replaces by the product.

    In two parts because a function has kept its tensors when its forward is done, and a recomputation ends when all are
    kept: so the product itself is not made a second time. PyTorch's own products are like that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        want_x, want_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if want_weight else None, weight if want_x else None)
        return x.new_empty(()).expand(x.size(0), weight.size(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad
        twice = torch.is_grad_enabled()  # whether this is to be differentiated in its turn, which oneDNN's are not
        # The weight's gradient first: an x that was recomputed, and copies of it, make room for the gradient of x.
        grad_weight = (x.t() @ grad if twice else weight_gradient(x, grad)) if want_weight else None
        del x
        grad_x = None
        if want_x:
            # In autocast's dtype.
            grad_x = grad @ weight.to(grad.dtype).t() if twice else multiply(grad, weight.t())
        grad_bias = (grad.sum(0) if twice else _column_sums(grad)) if want_bias else None
        return grad_x, grad_weight, grad_bias


def _column_sums(grad: Tensor) -> Tensor:
    """grad (n, m) -> (m,), by one pass that reads whole rows: PyTorch's takes twice as long in bfloat16."""
    if not _as_they_seem(grad) or transformed() or not kernel.serves(grad):
        return grad.sum(0)
    sums: Tensor = torch.ops.minigpt2.column_sums(grad)
    return sums


class _Filled(torch.autograd.Function):
    """The product, in the place that _Kept made for it."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, product: Callable[[], Tensor]) -> Tensor:
        return product()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


# Few rows.


def bfloat16_unit() -> str | None:
    """What this processor multiplies bfloat16 with, amx_bf16 or avx512_bf16; None where it has neither."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return next((name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)), None)


def _few_rows_serve(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled kernel is to make this product: with a bias x @ weight + bias, without one x @ weight^T.
    Ordered so that training leaves at the first question."""
    if torch.is_grad_enabled() or not x.dim() == weight.dim() == 2 or not 0 < x.size(0) <= kernel.FEW:
        return False
    inner, outer = weight.shape
    if bias is None:
        fits = x.size(1) == outer and outer % 16 == 0
    else:
        fits = x.size(1) == inner and bias.shape == (outer,) and outer % 32 == 0
    parts, dtype = (weight,) if bias is None else (weight, bias), x.dtype
    return (
        fits
        and x.size(1) > 0
        and dtype in (torch.float32, torch.bfloat16)
        and not torch.is_autocast_enabled("cpu")
        and kernel.direct(x, *parts)
        and x.stride(1) == 1
        and all(t.dtype is dtype and t.is_contiguous() for t in parts)
        and kernel.unavailable() is None
    )
