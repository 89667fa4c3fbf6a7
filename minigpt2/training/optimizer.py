"""What moves the weights: AdamW, or Muon for the matrices of the blocks and AdamW for everything else; after the
backward pass, or inside it."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minigpt2.model import GPT2
from minigpt2.ops.adamw import DTYPES, Step, adamw_step
from minigpt2.ops.kernel import adamw_blocks
from minigpt2.ops.products import TiledProducts, bfloat16_unit
from minigpt2.torch_private import muon
from minigpt2.training.shards import first_row, full_tensor, local_tensor, sharded

__all__ = ["AdamW", "InBackward", "Optimizers", "make_optimizer", "muon_pays"]

MOMENTS = ("exp_avg", "exp_avg_sq")


class Stepper:
    """Groups of parameters, of which each has its state from its first step on. PyTorch's class for that imports its
    compiler, 145 MiB and a second; those that follow call the functions that PyTorch's optimizers are made of."""

    def __init__(self, groups: Iterable[dict[str, Any]], **defaults: Any) -> None:
        self.param_groups = [defaults | group for group in groups]
        self.state: MutableMapping[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def make_state(self, p: Tensor) -> None:
        """The moments of a parameter that has none yet."""
        if not self.state[p]:
            self.state[p] = self._zeros(p)

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters that have a gradient."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for p in moved:
                self.make_state(p)
            if moved:
                self._move(moved, group)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _zeros(self, p: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _move(self, moved: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError


class AdamW(Stepper):
    """torch.optim.AdamW(groups, fused=True), the same to the bit and with the same state.

    With `moments` bf16 or 8bit those of matrices take half or a quarter of the memory (ops/adamw.py); those of vectors,
    which are few, stay as they are. A matrix has rows on one process only, with FSDP2, and each row is rounded by
    itself, by its number: so the steps do not depend on the processes, nor on when they are taken. torchao has such
    optimizers too, but compiles them with torch.compile, for each shape, at the first step.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        moments: str = "fp32",
    ) -> None:
        super().__init__(groups, betas=betas, eps=1e-8, weight_decay=weight_decay)
        self.moments = moments
        self.numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def _move(self, moved: list[Tensor], group: dict[str, Any]) -> None:
        if whole := [p for p in moved if not self._lowered(p)]:
            self._fused(whole, group)
        for p in filter(self._lowered, moved):
            self._step_lowered(p, group)

    def _lowered(self, p: Tensor) -> bool:
        return self.moments != "fp32" and p.dim() == 2

    def _zeros(self, p: Tensor) -> dict[str, Tensor]:
        dtype = DTYPES[self.moments] if self._lowered(p) else p.dtype
        state = {key: torch.zeros_like(p, dtype=dtype) for key in MOMENTS}
        if dtype == torch.uint8:
            state |= {f"{key}_scale": torch.zeros_like(p[:, : adamw_blocks(p.size(1))]) for key in MOMENTS}
        return state | {"step": torch.zeros((), device=p.device)}

    def _step_lowered(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        state["step"] += 1
        number = int(state["step"])
        first, second = (local_tensor(state[key]) for key in MOMENTS)
        scales = [local_tensor(state[f"{key}_scale"]) for key in MOMENTS if f"{key}_scale" in state]
        beta1, beta2 = group["betas"]
        rates = Step(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], number)
        seed = (number * 0x9E3779B9 + self.numbers[p]) & 0xFFFFFFFF
        both = (scales[0], scales[1]) if scales else None
        adamw_step(local_tensor(p), local_tensor(p.grad), (first, second), both, rates, seed, first_row(p))

    def _fused(self, moved: list[Tensor], group: dict[str, Any]) -> None:
        adamw(
            [local_tensor(p) for p in moved],
            [local_tensor(p.grad) for p in moved if p.grad is not None],
            [local_tensor(self.state[p][MOMENTS[0]]) for p in moved],
            [local_tensor(self.state[p][MOMENTS[1]]) for p in moved],
            [],
            [self.state[p]["step"] for p in moved],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{name: group[name] for name in ("lr", "weight_decay", "eps")},
        )


class BlockMuon(Stepper):
    """torch.optim.Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/), with its defaults, for weights stored
    (in, out): it takes them to be (out, in) and makes the step of one that widens larger, by the square root of out /
    in. `matrices` of a group says how many matrices lie beside each other in a weight, as q, k and v do in c_attn: each
    is orthogonalised for itself."""

    def _zeros(self, p: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)}

    def _move(self, moved: list[Tensor], group: dict[str, Any]) -> None:
        def pieces(tensors: Iterable[Any]) -> list[Tensor]:
            return [piece for tensor in tensors for piece in tensor.mT.chunk(group["matrices"])]

        with TiledProducts():
            muon()(
                pieces(moved),
                pieces(p.grad for p in moved),
                pieces(self.state[p]["momentum_buffer"] for p in moved),
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=0.95,
                nesterov=True,
                ns_coefficients=(3.4445, -4.7750, 2.0315),
                ns_steps=5,
                eps=1e-7,
                adjust_lr_fn=None,
                has_complex=False,
            )


class Optimizers:
    """Optimizers of distinct parameters, used as one: their groups, and their state by parameter. `clip` is the most
    that the norm of all gradients may be; 0 is off."""

    def __init__(self, model: nn.Module, optimizers: list[Any], clip: float = 0.0) -> None:
        self.parameters, self.optimizers, self.clip = list(model.parameters()), optimizers, clip
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.state = optimizers[0].state
        for optimizer in optimizers[1:]:
            optimizer.state = self.state

    moved = 0
    """How many parameters have moved before the step was ended by a gradient that is not finite."""

    @torch.no_grad()
    def make_state(self) -> None:
        """Make all moments that are not there yet: before the first step, beside the weights. The first step would make
        them among activations and gradients that come and go, and memory would have holes ever after."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    optimizer.make_state(p)

    def clip_gradients(self) -> Tensor:
        """Clip the gradients; the norm that they had, a scalar."""
        return full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf))

    def clips(self, norm: float) -> bool:
        """Whether a step whose gradients have that norm was clipped; to be asked before `zero_grad`."""
        return 0 < self.clip < norm

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class InBackward(Optimizers):
    """Optimizers whose steps are taken inside the backward pass: each parameter moves as soon as its gradient is
    complete, which is then dropped, so that the gradients are never all there. The weights are those of the same steps
    after the backward pass, to the bit, since nothing that follows in it reads a weight whose gradient is complete.

    What needs all gradients at once takes another form. The norm is put together of those that came. `clip` is for
    each parameter by itself, which does less than to clip the norm of all. From the first gradient that is not finite
    on no parameter moves any more until `zero_grad`; those before it have. A gradient must come complete, from one
    backward pass, so several micro-batches are no step for it, nor does DDP exchange it early enough. (FSDP2 does. The
    idea is that of LOMO, Lv et al. 2023, arXiv:2306.09782.)
    """

    def __init__(self, model: nn.Module, optimizers: list[Any], clip: float = 0.0) -> None:
        super().__init__(model, optimizers, clip)
        self.norms: dict[Tensor, Tensor] = {}
        self.halted = False
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.register_post_accumulate_grad_hook(functools.partial(self._arrived, optimizer))

    def _arrived(self, optimizer: Any, p: Tensor) -> None:
        assert p.grad is not None
        norm = self.norms[p] = full_tensor(nn.utils.get_total_norm([p.grad]))
        self.halted = self.halted or not math.isfinite(norm)  # on an accelerator this waits for it
        if not self.halted:
            if self.clip:
                nn.utils.clip_grads_with_norm_([p], self.clip, norm)
            optimizer.step()  # of the one parameter that has a gradient
            self.moved += 1
        p.grad = None

    def clip_gradients(self) -> Tensor:
        """The norm that the gradients had, a scalar; they were clipped and dropped as they came."""
        return torch.linalg.vector_norm(torch.stack([self.norms[p] for p in self.parameters if p in self.norms]))

    def clips(self, norm: float) -> bool:
        return any(super(InBackward, self).clips(float(of_one)) for of_one in self.norms.values())

    def zero_grad(self) -> None:
        super().zero_grad()
        self.norms.clear()
        self.halted, self.moved = False, 0


def muon_pays(device: torch.device) -> bool:
    """Whether this PyTorch has Muon, and the device multiplies bfloat16, in which Muon computes, as fast as float32 at
    least: elsewhere it can take several times as long as the rest of the step."""
    return muon() is not None and (device.type == "cuda" or (device.type == "cpu" and bfloat16_unit() is not None))


def make_optimizer(
    model: GPT2,
    kind: str,
    *,
    lr: float,
    embedding_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    clip: float = 0.0,
    in_backward: bool = False,
    moments: str = "fp32",
) -> Optimizers:
    """The optimizer called `kind`, adamw or muon, with the rate `lr` for the matrices of the blocks and `embedding_lr`
    for the rest: embeddings, biases, LayerNorms. Matrices decay, embeddings among them; vectors do not. Each group has
    its peak rate as `initial_lr`. With `in_backward` it is an InBackward. Raises ValueError for Muon with `moments`
    other than fp32, where PyTorch has no Muon, and where the weights are sharded: a part of a matrix cannot be
    orthogonalised."""
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
    optimizers: list[Any] = [AdamW(others, betas=betas, weight_decay=weight_decay, moments=moments)]
    if kind == "muon":
        if moments != "fp32":
            raise ValueError(f"--moments {moments} is for --optimizer adamw, not muon")
        if muon() is None:
            there = f"torch {torch.__version__} has no Muon where torch 2.10 to 2.14 have it"
            raise ValueError(f"{there}; take --optimizer adamw")
        if any(map(sharded, outside)):
            raise ValueError(
                "--optimizer muon needs whole matrices, and fsdp shards them; take --parallel ddp, or adamw"
            )
        groups = [{"params": packed, "matrices": 3}, {"params": single, "matrices": 1}]
        optimizers.append(BlockMuon(groups, lr=lr, weight_decay=weight_decay))
    made = (InBackward if in_backward else Optimizers)(model, optimizers, clip)
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]
    return made
