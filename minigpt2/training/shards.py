"""Tensors that FSDP2 shards over processes, and those that it does not. The module that defines them imports a computer
algebra system, 42 MiB and half a second, so nothing here imports it before FSDP2 did."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

__all__ = ["first_row", "full_tensor", "local_tensor", "placed_like", "sharded"]


def sharded(tensor: Tensor) -> bool:
    """Whether this process has only a shard of the tensor."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: Any) -> Tensor:
    """The tensor itself, or all of one that is sharded over processes, each of which must call this."""
    full: Tensor = tensor.full_tensor() if sharded(tensor) else tensor
    return full


def local_tensor(tensor: Any) -> Tensor:
    """What this process has of a tensor."""
    local: Tensor = tensor.to_local() if sharded(tensor) else tensor
    return local


def first_row(matrix: Any) -> int:
    """The row of the whole matrix with which this process's begin. Each process has as many as the first, but for the
    last ones."""
    mesh = matrix.device_mesh if sharded(matrix) else None
    return mesh.get_local_rank() * -(-matrix.size(0) // mesh.size()) if mesh else 0


def placed_like(p: Any, value: Tensor) -> Tensor:
    """`value`, which is whole, on p's device and sharded as p is."""
    value = value.to(p.device)
    if not sharded(p):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements)
