"""The seeds of dropout, drawn in the order of the model in compiled code too."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed"]


def draw_seed(x: Tensor) -> Tensor:
    """A seed, int64 (), on the device of `x`, the tensor to drop elements of; from torch's default generator.

    A compiler knows no order between operations that do not need one another's results, and Inductor does change it: a
    draw would then get the number that is another's. In compiled code `x` goes into the operation, so that it waits for
    all that led to `x`, earlier draws included.
    """
    if torch.compiler.is_compiling():
        seed: Tensor = torch.ops.minigpt2.draw_seed(x)
        return seed
    return _draw(x)


def _draw(x: Tensor) -> Tensor:
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=x.device)


torch.library.define("minigpt2::draw_seed", "(Tensor x) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])
torch.library.impl("minigpt2::draw_seed", "CompositeExplicitAutograd", _draw)
torch.library.register_fake("minigpt2::draw_seed", lambda x: torch.empty((), dtype=torch.int64, device=x.device))
