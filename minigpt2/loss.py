"""The head and the cross-entropy."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Reduction", "linear_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: Reduction = "mean", ignore_index: int = -100
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) in float32, over the targets that are not `ignore_index`.

    hidden (B, T, C), weight (V, C), targets (B, T). The mean or the sum is a scalar; "none" gives (B, T).
    """
    logits = F.linear(hidden, weight).float()
    loss = F.cross_entropy(
        logits.view(-1, logits.size(-1)), targets.reshape(-1), reduction=reduction, ignore_index=ignore_index
    )
    return loss.view(targets.shape) if reduction == "none" else loss
