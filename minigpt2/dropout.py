"""Dropout on the way into the residual stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["dropout_add"]


def dropout_add(x: Tensor, residual: Tensor | None, p: float) -> Tensor:
    """residual + dropout(x), or dropout(x) alone; p = 0 is no dropout. Tensors of one shape and dtype."""
    dropped = F.dropout(x, p) if p else x
    return dropped if residual is None else residual + dropped
