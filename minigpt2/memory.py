"""What a training step needs, in bytes, before it runs; frontier.py looks for the setting that fits a budget.

The arithmetic follows one step of `model.loss(...).backward()` and AdamW through time and takes the largest moment.
R is one residual tensor (batch x length x n_embd elements). A live block keeps 16 R for its backward pass:

    input of ln_1, its output, qkv (3), attention's output, input of ln_2, its output, c_fc's output (4), GELU's (4)

and, beside those, the log-sum-exp of attention and the statistics of the LayerNorms. Where relu or tanh stand in the
place of GELU, which read their result in the backward pass, c_fc's output is not among them. With
`recompute="pointwise"` the outputs of LayerNorm and GELU are not kept, which leaves 10 R. Dropout keeps a seed. A
recomputed segment keeps its input, 1 R, and with `"keep-attention"` another R a block. Under autocast, which computes
products in 16 bits, all of these but the inputs of the LayerNorms are half as large; weights, their gradients, the
optimizer's state and the residual stream stay float32.

The optimizer's own notches are Steppings: inside the backward pass there is one gradient at a time beside that of the
head, which waits for the embedding's where the two are tied; and moments may take fewer bytes.

On the CPU the peak is resident memory. On an accelerator it is what PyTorch counts of its tensors there, such as
torch.cuda.max_memory_allocated(), and PyTorch's dropout keeps a mask; the driver's context and the holes between blocks
come on top. The CPU's figures were measured; an accelerator's are the same arithmetic and were not.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from minigpt2.config import GPT2Config
from minigpt2.device import resident_bytes
from minigpt2.loss import by_tiles, chunk_shape
from minigpt2.machine import free_bytes
from minigpt2.ops.kernel import adamw_blocks as blocks
from minigpt2.ops.products import BLOCK, onednn_serves
from minigpt2.recompute import check_checkpoint_every, check_recompute, segments

__all__ = [
    "ORDINARY",
    "Amount",
    "Footprint",
    "Stepping",
    "footprint",
    "format_bytes",
    "parse_budget",
    "parse_bytes",
    "steppings",
]

# What a process holds beside its tensors once it trains: code that was not touched before and buffers of the matrix
# libraries; and PyTorch's compiler, with Triton where that is installed, which its optimizers import (not ours).
# Measured with next to no tensors: 20 MiB, and with the compiler 168 in all with Triton, 96 without it.
RUNTIME_BYTES = 20 * 2**20
COMPILER_BYTES = (144 if importlib.util.find_spec("triton") else 72) * 2**20

RANDOM_STATE_BYTES = 5056

# What PyTorch gives cuBLAS to work in: 32 MiB on Hopper, 8 MiB before it.
WORKSPACE_BYTES = 32 * 2**20

# Allocations of unlike sizes leave holes between them, also in the arena of tune_allocator: the peaks of processes were
# 0 to 5% above the bytes of their tensors, the most where most is recomputed (minigpt2 bench memory).
PACKING = 1.025

# What "auto" leaves of the memory that is free, since a prediction may be so much too low.
MARGIN = 0.05

# The activations whose backward pass reads what they returned, and not what they were given.
READ_THEIR_RESULT = ("relu", "tanh")

PRECISIONS = ("fp32", "bf16", "fp16")

# Bytes of optimizer state for each byte of a parameter.
OPTIMIZERS = {"adamw": 2, "muon": 2, "sgd-momentum": 1, "sgd": 0}

# Bytes of an element of AdamW's moments of matrices; the first are exact.
MOMENTS = {"fp32": 4, "bf16": 2, "8bit": 1}


class Stepping(NamedTuple):
    """How the optimizer moves the weights."""

    moments: str = "fp32"
    in_backward: bool = False

    @property
    def name(self) -> str:
        """As a heading."""
        return "in backward" if self == ("fp32", True) else "ordinary" if self == ORDINARY else self.moments


ORDINARY = Stepping()


def steppings(optimizer: str = "adamw", *, in_backward: bool = True) -> list[Stepping]:
    """Those that are worth a choice, in the order of less and less memory; with or without the optimizer inside the
    backward pass. Only AdamW has moments in fewer bytes."""
    lower = list(MOMENTS)[1:] if optimizer == "adamw" else []
    return [
        ORDINARY,
        *[Stepping()._replace(in_backward=True)] * in_backward,
        *(Stepping(m, in_backward) for m in lower),
    ]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one training step at one notch. The peak is less than the sum of the rest: activations
    are given back while gradients come."""

    checkpoint_every: int
    recompute: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What autograd holds between the forward and the backward pass; the loss has made the head's gradient by then, and
    it counts here."""
    tensors: int
    """The most bytes of tensors at any moment of a step."""
    peak: int
    """The most that is held at any moment of a step, above the interpreter with torch imported."""
    flops: int
    """Floating-point operations of a step without recomputation."""
    extra_flops: int
    """Floating-point operations of what is recomputed."""
    stepping: Stepping = ORDINARY

    @property
    def dials(self) -> str:
        """The setting, as Python writes it."""
        text = f"checkpoint_every={self.checkpoint_every}, recompute={self.recompute!r}"
        text += ", optimizer_in_backward=True" if self.stepping.in_backward else ""
        return text + (f", moments={self.stepping.moments!r}" if self.stepping.moments != "fp32" else "")

    @property
    def extra_work(self) -> float:
        """What is recomputed, as a share of the step's own operations."""
        return self.extra_flops / self.flops


def footprint(
    config: GPT2Config,
    batch: int,
    length: int,
    *,
    checkpoint_every: int = 0,
    recompute: str = "block",
    precision: str = "fp32",
    optimizer: str = "adamw",
    stepping: Stepping = ORDINARY,
    accumulate: int = 1,
    device: str = "cpu",
) -> Footprint:
    """Predict a step of `batch` sequences of `length` tokens, in a micro-batch, with float32 weights, products in
    `precision` (fp32, bf16 or fp16) and attention in one operation (`"fused"`, or `"sdpa"` where it does not
    materialise T x T), on a type of device.

    Raises ValueError for settings out of range, and for fp16 on a CPU, where attention keeps all T x T scores.
    """
    k, L = check_checkpoint_every(checkpoint_every, config.n_layer), config.n_layer
    if batch < 1 or not 1 <= length <= config.n_positions:
        raise ValueError(f"batch must be >= 1 and length 1 to n_positions={config.n_positions}, got {batch}, {length}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and device == "cpu":
        raise ValueError(
            "the memory of fp16 on a CPU is not predicted: attention keeps all T x T scores there; take bf16"
        )
    pointwise = check_recompute(recompute) == "pointwise"
    size = _Sizes(config, batch, length, precision != "fp32", pointwise=pointwise, cpu=device == "cpu")
    if device != "cpu" and config.resid_pdrop:
        size.block += 2 * batch * length * config.n_embd  # a mask of bytes for each of the two dropouts
    cut = segments(L, k)
    kept_attention = size.attention if recompute == "keep-attention" else 0
    # A checkpoint keeps the state of the random number generator, besides the input of its segment or block.
    inside = RANDOM_STATE_BYTES if recompute == "pointwise" else 0
    kept = [
        (size.R + RANDOM_STATE_BYTES + (s.stop - s.start) * (kept_attention + inside)) if s.recomputed else 0
        for s in cut
    ]
    size.block += inside
    live = (cut[-1].stop - cut[-1].start) * size.block

    weights = size.block_weights * L + size.head_weights + size.own_head + size.other_weights
    state = OPTIMIZERS[optimizer] * weights
    if optimizer == "muon":  # it has one moment of the blocks' matrices, and AdamW those of the rest
        state -= size.block_matrices * L
    state -= 2 * (size.block_matrices * L + size.embeddings) * (4 - MOMENTS[stepping.moments]) // 4
    if stepping.moments == "8bit":
        state += 2 * size.scales
    carried = weights if accumulate > 1 else 0  # gradients of earlier micro-batches
    arriving = 0 if carried or stepping.in_backward else size.block_weights  # gradients that stay, of a block
    stack = sum(kept) + live
    # ln_f's input and statistics; the gradients of the head and of what entered it; the token ids.
    activations = stack + size.R + size.statistics + size.R + size.head_weights + 16 * batch * length

    def instants() -> Iterator[int]:
        # The loss: ln_f's output is there too, and one chunk of logits.
        yield carried + activations + size.R + size.chunk
        # Backward. The head's gradient waits for that of the embedding, where they are tied, until the end; that of a
        # head of its own is there until the end, or is added to an earlier one at once.
        head = 0 if carried and size.own_head else size.head_weights
        held, gradients = stack + head, carried
        for segment, kept_here in zip(reversed(cut), reversed(kept), strict=True):
            n = segment.stop - segment.start
            if segment.recomputed:
                # "keep-attention" ends before the output is made; in a pointwise block what forward_extra has of GELU
                # is gone by then.
                output = size.R if recompute == "block" else 0
                yield gradients + held + size.R + n * (size.block - kept_attention) + size.forward_extra + output
            # From here on the segment is live, and gives back a block for each it goes through.
            below = held - (kept_here if segment.recomputed else n * size.block)
            recomputed = segment.recomputed or recompute == "pointwise"
            extra = size.recomputed_backward if recomputed else size.live_backward
            for i in reversed(range(n)):
                yield gradients + below + (i + 1) * size.block + extra
                gradients += arriving
            held = below
        # The embedding's gradient, or the rows of it that are added to the head's.
        embedding = size.head_weights if size.own_head or device != "cpu" else size.R
        yield gradients + head + embedding + size.other_weights + 2 * size.R
        if not stepping.in_backward:
            yield weights  # the gradients; the optimizer works in place

    tensors = weights + state + max(instants())
    compiler = 0 if optimizer in ("adamw", "muon") else COMPILER_BYTES
    again = sum(s.stop - s.start for s in cut if s.recomputed)
    extra = again * (size.block_flops + (0 if kept_attention else size.attention_flops))
    if kept_attention:
        extra -= sum(s.recomputed for s in cut) * size.last_product_flops
    if recompute == "pointwise":
        extra += L * size.pointwise_flops
    return Footprint(
        checkpoint_every=k,
        recompute=recompute,
        weights=weights,
        gradients=max(size.head_weights, size.largest) if stepping.in_backward else weights,
        optimizer=state,
        activations=activations,
        tensors=tensors,
        peak=int(PACKING * tensors) + RUNTIME_BYTES + compiler if device == "cpu" else tensors + WORKSPACE_BYTES,
        flops=3 * L * size.block_flops + L * size.attention_flops * 7 // 2 + 3 * size.head_flops,
        extra_flops=extra,
        stepping=stepping,
    )


class _Sizes:
    """Bytes and operations of the pieces of a step."""

    def __init__(self, config: GPT2Config, B: int, T: int, autocast: bool, *, pointwise: bool, cpu: bool) -> None:
        C, inner, V = config.n_embd, config.inner, config.vocab_size
        wide, e = 4, 2 if autocast else 4  # bytes of an element: of weights, sums and the residual stream; of products
        self.R = B * T * C * wide
        R = B * T * C * e
        act = B * T * inner * e
        self.statistics = 2 * B * T * wide
        self.attention = R + B * config.n_head * T * wide  # output and log-sum-exp
        # Inputs of the two LayerNorms, qkv, attention, c_fc's output ...
        self.block = 2 * self.R + 3 * R + self.attention + act
        reads_result = not pointwise and config.activation_function in READ_THEIR_RESULT
        if pointwise:  # attention's c_proj keeps its output, of which the input of ln_2 is made again
            self.block -= self.R - R
        else:
            self.block += 2 * R + act + 2 * self.statistics  # ... and the outputs of LayerNorm and GELU
        if reads_result:
            self.block -= act  # c_fc's output
        # On top of what is kept: c_proj's output before it is added, and what the recomputation of GELU made.
        # Under autocast it is widened first.
        self.forward_extra = R + (self.R if autocast else 0) + (act if pointwise else 0)
        # The backward pass of a block is largest in its MLP. For the gradient of c_proj's weight there are the
        # gradients of the residual stream and of c_proj's output, and what a pointwise block has recomputed: the
        # outputs of GELU and LayerNorm. After it there is the gradient of GELU's output, which takes the place of that
        # output where it was recomputed; then that of GELU's input, and no longer that of c_proj's output.
        again = R + self.R + 2 * self.statistics if pointwise else 0
        product = C * inner * e  # the gradient of c_proj's weight, before it is widened
        self.live_backward = product + max(self.R + R + act, self.R + 2 * act if reads_result else 0)
        self.recomputed_backward = product + again + self.R + (2 * act if pointwise or reads_result else act)
        if not cpu and autocast:
            self.block += (4 * C * C + 2 * C * inner) * e  # casts of the weights, which autocast keeps
        plain = cpu and not autocast
        if plain and onednn_serves(B * T * C * inner):
            # Copies of the operands of that product, and its result twice.
            copies = 3 * self.R + act + 2 * C * inner * e
            self.live_backward = max(self.live_backward, copies)
            self.recomputed_backward = max(self.recomputed_backward, again + copies + (act if pointwise else 0))
        self.largest = C * inner * wide
        wide_rows = config.n_layer * inner + config.n_positions + V * (1 if config.tie_word_embeddings else 2)
        of_block = config.n_layer * C * (blocks(3 * C) + blocks(C) + blocks(inner))
        self.scales = (of_block + wide_rows * blocks(C)) * wide  # of moments in 8 bits
        self.block_matrices = (4 * C * C + 2 * C * inner) * wide
        self.block_weights = self.block_matrices + (9 * C + inner) * wide
        self.head_weights = V * C * wide
        self.other_weights = (config.n_positions * C + 2 * C) * wide
        self.own_head = 0 if config.tie_word_embeddings else self.head_weights
        self.embeddings = self.head_weights + self.own_head + config.n_positions * C * wide
        dtype = torch.bfloat16 if cpu and autocast else torch.float32
        tiles = by_tiles("cpu" if cpu else "", dtype, B * T * V * C)
        rows, width = chunk_shape(B * T, V, dtype=dtype, tiles=tiles)
        self.chunk = rows * width * wide + 2 * rows * C * wide
        if autocast:  # the head and a chunk in lower precision, a block of the head's gradient, and what is widened
            self.chunk += (V * C + rows * width + min(V, BLOCK) * C) * e + 2 * rows * C * wide
        if cpu and autocast:  # the compiled kernel has no use for a chunk in float32
            self.chunk -= rows * width * wide
        if tiles:  # nor, with tiles, for a head in lower precision and a block of its gradient
            self.chunk -= (V + min(V, BLOCK)) * C * e
        if plain and onednn_serves(rows * V * C):
            self.chunk += (rows + C) * min(V, BLOCK) * wide  # a block of the weight's gradient, and of the logits
        tokens = B * T
        self.block_flops = 2 * tokens * (4 * C * C + 2 * C * inner)
        self.last_product_flops = 2 * tokens * C * inner
        # Two products of T x D x T a head, half of it above the diagonal; in the backward pass there are five.
        self.attention_flops = 2 * tokens * T * C
        self.head_flops = 2 * tokens * V * C
        self.pointwise_flops = tokens * (2 * 8 * C + 12 * inner)  # an estimate: 8 an element of LayerNorm, 12 of GELU


class Amount(int):
    """Bytes that somebody asked for, which `format_bytes` writes as they were given."""

    given: str


def parse_bytes(text: str) -> Amount:
    """Bytes meant by a text such as "4GiB", "512 MiB" or "2GB"; a number without a unit counts bytes, and is refused
    below 1 MiB, where the unit was forgotten."""
    units = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    units |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in units or not 0 < float(match[1]) < 1e30:
        raise ValueError(f"expected an amount of memory such as 4GiB or 512MiB, got {text!r}")
    amount = Amount(float(match[1]) * units[match[2]])
    if not match[2] and amount < 2**20:
        raise ValueError(
            f"{text.strip()} of which unit? Give an amount of memory such as {match[1]}GiB or {match[1]}MiB"
        )
    amount.given = text.strip()
    return amount


def parse_budget(text: str, device: str | torch.device) -> int:
    """The bytes that this process may hold in all (on CUDA, its tensors): those of `parse_bytes`, or for "auto" what it
    holds now and what the machine has free, less MARGIN. On the CPU the processes that torchrun started share what is
    free evenly. ValueError where there is nothing to ask."""
    if text != "auto":
        return parse_bytes(text)
    device = torch.device(device)
    if device.type == "cpu":
        free, held = free_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), resident_bytes()
    elif device.type == "cuda" and torch.cuda.is_available():
        free, held = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_allocated(device)
    else:
        raise ValueError(
            f"there is no {device} device here to say how much memory is free; give an amount, such as 4GiB"
        )
    return held + int((1 - MARGIN) * free)


def format_bytes(n: int) -> str:
    """Bytes in GiB, or MiB below one; an Amount as it was given."""
    if isinstance(n, Amount):
        return n.given
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
