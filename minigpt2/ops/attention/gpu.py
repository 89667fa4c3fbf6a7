"""Attention on the GPU: calls the Triton kernels of gpu_kernels.py, with tiles that are chosen by timing.

They are chosen once for each kind of shape, and the choice is kept in Triton's cache. This module imports Triton;
fused.py imports this module when the first CUDA tensor comes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from minigpt2.ops.attention.gpu_kernels import delta_kernel, forward_kernel, key_kernel, query_kernel
from minigpt2.ops.checks import checked_scale


class Tiles(NamedTuple):
    """A way to cut the work of one kernel: query rows and keys of a tile, and what a program of it runs with."""

    rows: int
    keys: int  # a multiple of 32, the period of the dropout mask
    warps: int
    stages: int  # tiles under way from memory at a time


# What is tried, by kernel, bytes of an element and head size (the next power of two, from 64 on). A program's sums and
# scores must fit in its threads' registers, 255 each, or they spill to memory; and its tiles in shared memory, or it
# does not start: 99 KiB on capability 8.6, 8.9 and 12.0, 163 on 8.0, and 227 on 9.0, where operands lie there that are
# in registers elsewhere. tests/ops/attention/compile_for_gpus.py checks. float32 has small tiles: without tf32 it
# cannot use the matrix units, and products take more registers.
TILES = {
    ("forward", 2, 64): [Tiles(128, 64, 8, 3), Tiles(128, 64, 4, 3), Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 3)],
    ("forward", 2, 128): [Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)],
    ("forward", 2, 256): [Tiles(64, 32, 8, 2)],
    ("forward", 4, 64): [Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2)],
    ("forward", 4, 128): [Tiles(16, 32, 8, 1)],
    ("delta", 2, 64): [Tiles(32, 32, 4, 1)],
    ("delta", 2, 128): [Tiles(32, 32, 4, 1)],
    ("delta", 2, 256): [Tiles(32, 32, 8, 1)],
    ("delta", 4, 64): [Tiles(32, 32, 4, 1)],
    ("delta", 4, 128): [Tiles(32, 32, 16, 1)],
    ("queries", 2, 64): [Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 3)],
    ("queries", 2, 128): [Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(128, 32, 8, 2)],
    ("queries", 2, 256): [Tiles(32, 32, 8, 1)],
    ("queries", 4, 64): [Tiles(32, 32, 8, 1)],
    ("queries", 4, 128): [Tiles(32, 32, 16, 1)],
    ("keys", 2, 64): [Tiles(64, 64, 4, 2), Tiles(64, 128, 8, 2), Tiles(32, 64, 4, 3)],
    ("keys", 2, 128): [Tiles(32, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 2)],
    ("keys", 2, 256): [Tiles(32, 32, 8, 1)],
    ("keys", 4, 64): [Tiles(32, 32, 8, 1), Tiles(64, 32, 8, 1)],
    ("keys", 4, 128): [Tiles(16, 32, 8, 1)],
}

KERNELS = {"forward": forward_kernel, "delta": delta_kernel, "queries": query_kernel, "keys": key_kernel}


def tiles_for(kernel: str, dtype: torch.dtype, head_dim: int) -> list[Tiles]:
    """The tile sizes to choose from."""
    return TILES[kernel, dtype.itemsize, max(64, triton.next_power_of_2(head_dim))]


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: "tf32" where torch is told that its own may be, else "ieee"."""
    matmul: Any = torch.backends.cuda.matmul
    # The older switch cannot be read once the newer one, where torch has it, was used.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def forward(
    qkv: Tensor,
    n_head: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float | None = None,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """The operation minigpt2::attention of fused.py, whose arguments these are, checked; seed is on qkv's device.

    qkv (B, T, 3C), float16, bfloat16 or float32, its last stride 1 -> (B, T, C) and the log-sum-exp (B, H, T), float32.
    On CPU tensors it runs in Triton's interpreter, if TRITON_INTERPRET=1 was set before Triton was imported. `tiles`
    leaves out the choosing.
    """
    B, T, width = qkv.shape
    out = qkv.new_empty((B, T, width // 3))
    lse = torch.empty((B, n_head, T), dtype=torch.float32, device=qkv.device)
    tensors = {"qkv": qkv, "out": out, "lse": lse, "seed": seed if dropout_p else None}
    strides = {"stride_batch": qkv.stride(0), "stride_row": qkv.stride(1)}
    _launch("forward", {**tensors, **strides, **_common(qkv, n_head, dropout_p, scale)}, B * n_head, "ROWS", tiles)
    return out, lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float | None = None,
    *,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:
    """The operation minigpt2::attention_backward: the gradient of qkv, packed like it; `out` and `lse` contiguous.

    `tiles` are those of the queries' kernel and of the keys'.
    """
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse)
    arguments = {
        **{"qkv": qkv, "grad_out": grad_out, "lse": lse, "delta": delta},
        **{"seed": seed if dropout_p else None, "stride_batch": qkv.stride(0), "stride_row": qkv.stride(1)},
        **{"grad_stride_batch": grad_out.stride(0), "grad_stride_row": grad_out.stride(1)},
        **_common(qkv, n_head, dropout_p, scale),
    }
    of_queries, of_keys = tiles or (None, None)
    heads = lse.shape[0] * n_head
    _launch("delta", {**arguments, "out": out}, heads, "ROWS", None)
    _launch("queries", {**arguments, "grad_qkv": grad_qkv}, heads, "ROWS", of_queries)
    _launch("keys", {**arguments, "grad_qkv": grad_qkv}, heads, "KEYS", of_keys)
    return grad_qkv


def _common(qkv: Tensor, n_head: int, dropout_p: float, scale: float | None) -> dict[str, Any]:
    T, head_dim = qkv.shape[1], qkv.shape[2] // 3 // n_head
    return {
        "T": T,
        "H": n_head,
        "scale": checked_scale(scale, head_dim),
        "threshold": int(dropout_p * 65536 + 0.5),
        "keep_scale": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        "LENGTH": min(max(triton.next_power_of_2(T), 128), 4096),  # for the choice of tiles alone
        "HEAD_DIM": head_dim,
        "WIDTH": triton.next_power_of_2(head_dim),
        "DROPOUT": dropout_p > 0,
        "PRECISION": precision(qkv.dtype),
    }


def _launch(kernel: str, arguments: dict[str, Any], heads: int, band: str, tiles: Tiles | None) -> None:
    """Run a kernel with one program for each head and band, of as many rows or keys as `band` says."""
    qkv, T = arguments["qkv"], arguments["T"]
    if not heads * T:
        return
    choices = tiles_for(kernel, qkv.dtype, arguments["HEAD_DIM"])
    if tiles is None and not qkv.is_cuda:
        tiles = choices[0]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (heads * triton.cdiv(T, meta[band]),)

    with torch.cuda.device_of(qkv):
        if tiles is None:
            _tuned(kernel, tuple(choices))[grid](**arguments)
        else:
            KERNELS[kernel][grid](**arguments, **config(tiles).all_kwargs())


def config(tiles: Tiles) -> Any:
    return triton.Config({"ROWS": tiles.rows, "KEYS": tiles.keys}, num_warps=tiles.warps, num_stages=tiles.stages)


@functools.cache
def _tuned(kernel: str, choices: tuple[Tiles, ...]) -> Any:
    """The kernel with its tiles chosen by timing, at the first call for each combination of the key's values.

    The choice is kept on disk with the compiled kernels: another process must not choose otherwise, or a resumed run
    would round otherwise. Tiles that do not fit on the device are left out of the choice by Triton.
    """
    key = ["HEAD_DIM", "LENGTH", "DROPOUT", "PRECISION"]  # and, of itself, the dtypes
    return triton.autotune([config(tiles) for tiles in choices], key=key, cache_results=True)(KERNELS[kernel])
