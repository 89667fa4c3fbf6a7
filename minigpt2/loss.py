"""The head and the cross-entropy in one operation, which never holds more than one chunk of the logits.

A token with hidden state h (C,) and target t has the logits z = W h over the V words of the vocabulary, and the loss
and gradients (Bishop 2006, "Pattern Recognition and Machine Learning", equations 4.108 and 4.109)

    loss = logsumexp(z) - z[t]        dloss/dz = softmax(z) - onehot(t) =: d        dloss/dh = W^T d
                                                                                     dloss/dW = d h^T

The plain form holds, at its worst moment in the backward pass, three tensors of tokens x V, by far the largest of a
training step: the log-softmax of the logits, its gradient and theirs. But d needs the logits of its own token only, so
a few hundred tokens can be handled at a time: their logits become softmax(z), then d, in the same memory, and d goes
into the two gradients at once. All of this happens in the *forward* pass, while the logits are at hand, and so takes
the three matrix products of the plain form. The backward pass only multiplies by the gradient that reaches the loss.
Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) made this form of chunking known; Cut Cross-Entropy (Wijmans et al.
2024, arXiv:2411.09009) goes further.

With reduction="none" each loss receives a gradient of its own, which the forward pass cannot know. The backward pass
then computes the logits again, chunk by chunk: a fourth product.

PyTorch has had torch.nn.functional.linear_cross_entropy since 2.13, which is chunked too. With chunks of the same size
it takes 1.13 times as long [1.11, 1.20] for 4096 tokens and 1.14 times [1.13, 1.16] for 2048, and 376 and 366 MiB where
this takes 232 and 222, since its backward pass copies the weight's gradient (`minigpt2 bench loss --tokens 4096`: the
124M head, float32, 2 threads of an AMD EPYC with AVX-512, torch 2.13.0); on an Intel Xeon it took 1.01 times as long
[0.91, 1.05], in 398 MiB where this took 256. Under autocast its products stay float32; the gradients are nan where a
mean is over ignored tokens alone; and it drops the tangents of forward-mode differentiation.
The tests hold the two to the same numbers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.device import readable
from minigpt2.ops import kernel
from minigpt2.ops.products import add_transposed_product, multiply, onednn_serves, tiles_multiply
from minigpt2.torch_private import backward_keeps_graph, transformed

__all__ = ["by_tiles", "chunk_shape", "linear_cross_entropy"]

# The most memory for a chunk of logits, by bytes of an element: 320 tokens of GPT-2, 512 of bfloat16. Each chunk reads
# the whole head twice, and reads and writes its whole gradient, so small chunks are slow: beside 512 tokens, 64 at a
# time take 1.4 times as long, 128 take 1.15 times and 256 take 1.05 times, with half the memory (2 cores, AVX-512,
# C = 768).
_CHUNK_BYTES = {4: 64 * 2**20, 2: 50 * 2**20}
# Where float32 weights are multiplied as they are, on AMX, there is no cast of the head, of 74 MiB, and 1024 tokens of
# GPT-2 take no more memory than 512 beside it.
_TILES_CHUNK_BYTES = 105 * 2**20
# On AMX oneDNN took 1.2 to 1.4 times as long for the loss of 342 tokens in bfloat16 as for that of 352 (`minigpt2 bench
# loss --tokens 342 --bfloat16`).
_TOKEN_MULTIPLE = 32
# MKL writes rows of logits that start on a cache line 1.4 times as fast as rows of 50257 floats. So a chunk's rows are
# padded to a multiple of this many elements; the padding holds logits of -inf, which softmax turns into zeros.
_ROW_MULTIPLE = 64
_COMPILED = (torch.float32, torch.bfloat16)  # PyTorch has a faster exponential of float64


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight), targets)`, without the logits.

    hidden: (..., C), the output of the last LayerNorm. weight: (V, C), the head, in the same dtype unless autocast is
    on. targets: (...), ids in [0, V), int64 or int32, or ignore_index where a token does not count.
    reduction: "mean" over the tokens that count, "sum", or "none": the loss of each token, in the shape of targets.
    chunk_size: the most tokens at a time; None stands for as many as have 64 MiB of float32 logits, or 50 MiB of
    bfloat16 ones where the compiled kernel serves, 105 MiB on AMX.

    The loss is float32, or float64 for float64 inputs. Under autocast, and for inputs of lower precision, the matrix
    products are in the lower precision; softmax, losses and the sum of the weight's gradient over chunks are float32.
    If no token counts, the sum is 0, the mean is nan and the gradients are 0, as with F.cross_entropy.
    Under torch.func's transforms, in forward mode and under torch.jit.trace this is the plain form, with all logits.
    There is no second derivative: backward(create_graph=True) raises NotImplementedError.

    Raises TypeError for dtypes, and ValueError for shapes, devices and settings, that do not fit together, and
    ValueError for an id outside the vocabulary. Ids on an accelerator are not checked here, since that would wait for
    the device: there, as in a compiled graph, PyTorch's own bounds check fails.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", not {reduction!r}')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:] or hidden.shape[:-1] != targets.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (hidden, weight, targets))
        raise ValueError(f"hidden (..., C), weight (V, C) and targets (...) do not fit together: {shapes}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32 token ids, not {targets.dtype}")
    if not hidden.device == weight.device == targets.device:
        devices = ", ".join(str(t.device) for t in (hidden, weight, targets))
        raise ValueError(f"hidden, weight and targets must be on one device, not on {devices}")
    targets = targets.long()
    vocab, dtype, device = weight.shape[0], hidden.dtype, hidden.device.type
    if dtype != torch.float64 and not hidden.is_meta and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif dtype != weight.dtype:
        raise TypeError(f"hidden is {dtype} but weight is {weight.dtype}")
    if transformed():
        logits = F.linear(hidden, weight).flatten(0, -2).to(torch.promote_types(dtype, torch.float32))
        losses = F.cross_entropy(logits, targets.flatten(), reduction=reduction, ignore_index=ignore_index)
        return losses.view(targets.shape) if reduction == "none" else losses
    if readable(targets):
        outside = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab))]
        if outside.numel():
            raise ValueError(f"target {outside[0].item()} is neither in [0, {vocab}) nor ignore_index ({ignore_index})")

    compiled = dtype if kernel.serves(hidden) else torch.float32
    tiles = by_tiles(device, compiled, hidden.numel() * vocab) and weight.dtype == torch.float32
    chunk_size = chunk_size or _most_tokens(vocab, compiled, tiles)
    total = reduction != "none"
    gradients = total and torch.is_grad_enabled()
    flat = hidden.reshape(targets.numel(), hidden.shape[-1])
    options = (chunk_size, dtype, total, gradients and hidden.requires_grad, gradients and weight.requires_grad)
    loss: Tensor = _chunked(flat, weight, targets.reshape(-1), None, ignore_index, *options)[0]
    if reduction != "mean":
        return loss if total else loss.view(targets.shape)
    count = (targets != ignore_index).sum()
    # Dividing by zero would also give nan, but to the gradients as well.
    return torch.where(count > 0, loss / count.clamp(min=1), float("nan"))


def by_tiles(device: str, dtype: torch.dtype, multiplications: int) -> bool:
    """Whether the loss multiplies by tiles, for products of this size in dtype."""
    plain = device == "cpu" and dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return plain and tiles_multiply(multiplications)


def chunk_shape(
    tokens: int, vocab: int, most: int | None = None, dtype: torch.dtype = torch.float32, tiles: bool = False
) -> tuple[int, int]:
    """Rows and padded columns of a chunk of logits in dtype: at most `most` tokens, or as many as a chunk has bytes
    for, more of them if it is multiplied by `tiles`."""
    most = most or _most_tokens(vocab, dtype, tiles)
    rows, width = tokens, _round_up(vocab, _ROW_MULTIPLE)
    if tokens > most:
        # Of equal size, but for rounding, since a small last one would cost as much as a large one.
        multiple = _TOKEN_MULTIPLE if most >= 2 * _TOKEN_MULTIPLE else 1
        rows = _round_up(-(-tokens // -(-tokens // (most // multiple * multiple))), multiple)
    return rows, width


def _most_tokens(vocab: int, dtype: torch.dtype, tiles: bool) -> int:
    size = 2 if dtype == torch.bfloat16 else 4
    return max(1, (_TILES_CHUNK_BYTES if tiles else _CHUNK_BYTES[size]) // (size * vocab))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# Defined by its schema: torch.library.custom_op would import the compiler (see checkpoint.py) at the first call.
torch.library.define(
    "minigpt2::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? grad_losses, int ignore_index, int chunk_size, "
    "ScalarType dtype, bool total, bool want_hidden, bool want_weight) -> (Tensor, Tensor, Tensor)",
)
_chunked: Any = torch.ops.minigpt2.linear_cross_entropy


@torch.library.impl("minigpt2::linear_cross_entropy", "CompositeExplicitAutograd")
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad_losses: Tensor | None,
    ignore_index: int,
    chunk_size: int,
    dtype: torch.dtype,
    total: bool,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token (N,), or if `total` their sum (), and the gradients of hidden (N, C) and weight (V, C).

    The gradients are those of the sum of the losses, each times its grad_losses (N,) where given; one that is not
    wanted is an empty tensor. The matrix products are in `dtype`.
    """
    tokens, vocab = hidden.shape[0], weight.shape[0]
    losses, grad_hidden, grad_weight = _outputs(hidden, weight, dtype, False, want_hidden, want_weight)
    wide = losses.dtype
    counts = targets != ignore_index
    labels = torch.where(counts, targets, 0).unsqueeze(1)
    factors = torch.where(counts, 1.0 if grad_losses is None else grad_losses, 0.0).to(wide).unsqueeze(1)
    tiles = by_tiles(hidden.device.type, dtype, min(chunk_size, tokens) * weight.numel())
    head = weight if tiles and weight.dtype in (dtype, torch.float32) else weight.to(dtype)
    chunk_size, width = chunk_shape(tokens, vocab, chunk_size)
    onednn = onednn_serves(chunk_size * head.numel(), hidden, head)  # which allocates the logits itself, unpadded

    # The compiled kernel makes d in the memory of the logits; without it, lower precision has it made in float32.
    compiled = dtype in _COMPILED and all(map(kernel.serves, (hidden, head)))
    # All chunks share this memory; the weight's gradient is summed in float32.
    narrow = hidden.new_empty(0 if onednn else chunk_size, width, dtype=dtype)
    # Of a bfloat16 matrix with padded rows oneDNN reads the padding too on AMX, and multiplies it by zero (torch 2.13).
    narrow[:, vocab:] = 0
    padded = narrow if compiled or dtype == wide else torch.empty_like(narrow, dtype=wide)
    weight_sum = grad_weight if grad_weight.dtype == wide else torch.empty_like(grad_weight, dtype=wide)
    weight_sum = weight_sum if tokens else weight_sum.zero_()  # without tokens no chunk writes it
    for start in range(0, tokens, max(1, chunk_size)):
        chunk = slice(start, start + chunk_size)
        label, factor, inputs = labels[chunk], factors[chunk], hidden[chunk].to(dtype)
        if onednn:
            operand = None  # the last chunk's make room
            operand = multiply(inputs, head.t())
        else:
            operand = narrow[: len(label), :vocab]  # (n, V): the logits, then d
            if tiles:
                kernel.matmul(inputs, head.t(), out=operand)
            else:
                torch.mm(inputs, head.t(), out=operand)
        if compiled:
            losses[chunk] = kernel.cross_entropy_(operand, label.squeeze(1), gradient=want_hidden or want_weight)
        else:
            losses[chunk] = _cross_entropy_(operand, operand if onednn else padded[: len(label)], label)
        if not (want_hidden or want_weight):
            continue
        if want_hidden:
            product = kernel.matmul(operand, head, dtype=wide) if tiles else multiply(operand, head)
            grad_hidden[chunk] = product * factor
        if want_weight:
            # To scale the inputs (n, C) rather than d (n, V) saves a pass over the chunk.
            scaled = (inputs * factor).to(dtype)
            add_transposed_product(weight_sum, operand, scaled, first=start == 0)
    losses.masked_fill_(~counts, 0)
    grad_weight = grad_weight if grad_weight is weight_sum else grad_weight.copy_(weight_sum)
    return losses.sum() if total else losses, grad_hidden, grad_weight


def _cross_entropy_(logits: Tensor, padded: Tensor, label: Tensor) -> Tensor:
    """Make d = softmax - onehot of a chunk of logits (n, V), in place, and return its losses (n,). `padded` (n, V +
    padding) is the same memory with the columns that pad it or, for logits in lower precision, float32 to work in."""
    z = padded[:, : logits.size(1)]
    if z.dtype != logits.dtype:
        z.copy_(logits)
    padded[:, logits.size(1) :] = -torch.inf
    largest, logit = padded.amax(1), z.gather(1, label).squeeze(1)
    torch.softmax(padded, 1, out=padded)  # in place: a row is written when its maximum and sum are known
    # The largest probability is exp(largest - logsumexp), so logsumexp = largest - log(largest probability). That one
    # is at least 1 / V, so its logarithm is finite; the label's may not be. No other way costs less than two maxima.
    losses = largest - padded.amax(1).log() - logit
    z.scatter_(1, label, z.gather(1, label) - 1)
    if z.dtype != logits.dtype:
        logits.copy_(z)
    return losses


def _outputs(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, total: bool, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty(() if total else hidden.shape[:1], dtype=wide),
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, _, *ctx.settings, ctx.total, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros (V, C) would be made for the gradient of a gradient
    ctx.save_for_backward(*(output[1:] if ctx.total else (hidden, weight, targets)))


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "linear_cross_entropy has no second derivative: call backward without create_graph, "
            "or take torch.nn.functional.cross_entropy of the logits"
        )
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    want_hidden, want_weight, *others = ctx.needs_input_grad
    if ctx.total:
        # In place, which saves memory of the weight's size; but not where the pass may be repeated, nor in a trace, in
        # which a compiler decides on memory.
        scale = torch.mul if backward_keeps_graph() or type(grad_loss) is not Tensor else Tensor.mul_
        grad_hidden, grad_weight = (scale(grad, grad_loss) for grad in ctx.saved_tensors)
    else:
        hidden, weight, targets = ctx.saved_tensors
        want = (False, want_hidden, want_weight)
        _, grad_hidden, grad_weight = _chunked(hidden, weight, targets, grad_loss, *ctx.settings, *want)
    return grad_hidden if want_hidden else None, grad_weight if want_weight else None, *(None for _ in others)


torch.library.register_fake(
    "minigpt2::linear_cross_entropy",
    lambda hidden, weight, targets, grad_losses, ignore_index, chunk_size, dtype, total, *want: _outputs(
        hidden, weight, dtype, total, *want
    ),
)
torch.library.register_autograd("minigpt2::linear_cross_entropy", _backward, setup_context=_save)
