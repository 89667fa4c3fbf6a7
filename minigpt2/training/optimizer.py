"""What moves the weights: AdamW, or Muon for the matrices of the blocks and AdamW for everything else."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from minigpt2.model import GPT2
from minigpt2.ops.products import bfloat16_unit

__all__ = ["Optimizers", "make_optimizer", "muon_pays"]

Muon: Any = getattr(torch.optim, "Muon", object)  # since torch 2.9


class BlockMuon(Muon):  # type: ignore[misc]
    """torch.optim.Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) for weights stored (in, out): it takes
    them to be (out, in) and makes the step of one that widens larger, by the square root of out / in. `matrices` of a
    group says how many matrices lie beside each other in a weight, as q, k and v do in c_attn: each is orthogonalised
    for itself."""

    def _init_group(
        self, group: MutableMapping[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]
    ) -> bool:
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                for tensors, tensor in ((params, p), (grads, p.grad), (buffers, state["momentum_buffer"])):
                    tensors.extend(tensor.mT.chunk(group["matrices"]))
        return False  # whether any is complex


class Optimizers:
    """Optimizers of distinct parameters, used as one: their groups, and their state by parameter."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.state = optimizers[0].state
        for optimizer in optimizers[1:]:
            optimizer.state = self.state

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def muon_pays(device: torch.device) -> bool:
    """Whether this PyTorch has Muon, and the device multiplies bfloat16, in which Muon computes, as fast as float32 at
    least: elsewhere it can take several times as long as the rest of the step."""
    return Muon is not object and (device.type == "cuda" or (device.type == "cpu" and bfloat16_unit() is not None))


def make_optimizer(
    model: GPT2, kind: str, *, lr: float, embedding_lr: float, weight_decay: float, betas: tuple[float, float]
) -> Optimizers:
    """The optimizer called `kind`, adamw or muon, with the rate `lr` for the matrices of the blocks and `embedding_lr`
    for the rest: embeddings, biases, LayerNorms. Matrices decay, embeddings among them; vectors do not. Each group has
    its peak rate as `initial_lr`. Raises ValueError where PyTorch has no Muon or the weights are sharded: a part of a
    matrix cannot be orthogonalised."""
    blocks = [(name, p) for name, p in model.h.named_parameters() if p.dim() >= 2]
    packed = [p for name, p in blocks if name.endswith("c_attn.weight")]
    single = [p for name, p in blocks if not name.endswith("c_attn.weight")]
    inside = {id(p) for _, p in blocks}
    outside = [p for p in model.parameters() if id(p) not in inside]
    others: list[dict[str, Any]] = [
        {"params": [p for p in outside if p.dim() >= 2], "lr": embedding_lr},
        {"params": [p for p in outside if p.dim() < 2], "lr": embedding_lr, "weight_decay": 0.0},
    ]
    if kind == "adamw":
        others.append({"params": packed + single, "lr": lr})
    optimizers: list[Any] = [torch.optim.AdamW(others, betas=betas, weight_decay=weight_decay, fused=True)]
    if kind == "muon":
        if Muon is object:
            raise ValueError(f"--optimizer muon needs torch 2.9 or newer, this is {torch.__version__}; adamw does not")
        if any(isinstance(p, DTensor) for p in outside):
            raise ValueError(
                "--optimizer muon needs whole matrices, and fsdp shards them; take --parallel ddp, or adamw"
            )
        groups = [{"params": packed, "matrices": 3}, {"params": single, "matrices": 1}]
        optimizers.append(BlockMuon(groups, lr=lr, weight_decay=weight_decay))
    made = Optimizers(*optimizers)
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]
    return made
