"""The head and the cross-entropy as one operation that never holds more than one chunk of logits.

A token with hidden state h (C,) and label t has logits z = W h over the V words of the vocabulary, and costs

    loss = logsumexp(z) - z[t]        d loss / d z = softmax(z) - onehot(t) =: d        d loss / d h = W^T d
                                                                                         d loss / d W = d h^T

The plain form keeps z, its log-softmax and its gradient for every token: three tensors of tokens x V, by far the
largest of a training step. But a token's d needs nothing beyond its own z, so a few hundred tokens at a time suffice:
their z becomes softmax(z), then d, in the same memory, and d is spent at once on the two gradients. This happens in the
*forward*, where z is already at hand, so the work is that of the plain form: three matrix products. What is left for
the backward is a factor, the gradient of the loss that it is given. Chunking the head like this is known from Liger
Kernel (Hsu et al., 2024, arXiv:2410.10989) and, taken further, from Cut Cross-Entropy (Wijmans et al., 2024,
arXiv:2411.09009).

Per-token losses (reduction="none") may each receive a gradient of their own, unknown in the forward: their backward
computes z anew, chunk by chunk, a fourth product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.device import readable
from minigpt2.ops.products import add_transposed_product, multiply, onednn_serves
from minigpt2.torch_private import backward_keeps_graph, transformed

# The largest chunk of float32 logits, 333 tokens of GPT-2's. Every chunk reads all of the head twice, and reads and
# writes all of its gradient, which few tokens do not repay: head and loss take 1.4 times as long with 64 tokens a chunk
# as with 512, 1.15 times with 128, but only 1.05 times with 256, at half the memory (2 cores, AVX-512, C = 768).
_CHUNK_BYTES = 64 * 2**20
# MKL writes rows of logits that start on a cache line 1.4 times as fast as rows of 50257 floats: the chunk's rows are
# padded to a multiple of this many elements, and the padding holds logits of -inf, which softmax turns into zeros.
_ROW_MULTIPLE = 64


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

    hidden: (..., C), the output of the last LayerNorm. weight: (V, C), the head, of its dtype unless autocast is on.
    targets: (...), int64 ids in [0, V), or ignore_index for tokens that count for nothing.
    reduction: "mean" over the tokens that count, "sum", or "none": one loss a token, in the shape of targets.
    chunk_size: tokens worked on at once, at most; None takes as many as have 64 MiB of logits.

    The loss is float32 (float64 for float64 inputs). Under autocast, and for half-precision inputs, the matrix products
    are in the lower precision; softmax, losses and the sum over chunks of weight's gradient are in float32.
    If every token is ignored the sum is 0, the mean nan, and the gradients 0, as with F.cross_entropy.
    There is no second derivative: backward(create_graph=True) raises. Under the transforms of torch.func and in
    forward mode it is the plain form, which holds all logits.

    Raises ValueError or TypeError for arguments that do not fit together, and ValueError for an id outside the
    vocabulary. On an accelerator ids are not looked at, since that would wait for the device; there, as in a compiled
    graph, it is the device's own bounds check that fails.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", not {reduction!r}')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:] or hidden.shape[:-1] != targets.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (hidden, weight, targets))
        raise ValueError(f"hidden (..., C), weight (V, C) and targets (...) do not fit together: {shapes}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, not {targets.dtype}")
    if not hidden.device == weight.device == targets.device:
        devices = ", ".join(str(t.device) for t in (hidden, weight, targets))
        raise ValueError(f"hidden, weight and targets must be on one device, got {devices}")
    targets = targets.long()
    vocab, dtype, device = weight.shape[0], hidden.dtype, hidden.device.type
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif dtype != weight.dtype:
        raise TypeError(f"hidden is {dtype} but weight is {weight.dtype}")
    if readable(targets):
        outside = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab))]
        if outside.numel():
            raise ValueError(f"target {outside[0].item()} is neither in [0, {vocab}) nor ignore_index ({ignore_index})")

    if transformed():  # the plain form, which is known to all of them
        logits = F.linear(hidden, weight).flatten(0, -2).to(torch.promote_types(dtype, torch.float32))
        losses = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=reduction)
        return losses.view(targets.shape) if reduction == "none" else losses

    chunk_size = chunk_size or chunk_shape(targets.numel(), vocab)[0]
    total = reduction != "none"
    gradients = total and torch.is_grad_enabled()
    flat = hidden.reshape(-1, hidden.shape[-1])
    options = (chunk_size, dtype, total, gradients and hidden.requires_grad, gradients and weight.requires_grad)
    loss: Tensor = _chunked(flat, weight, targets.reshape(-1), None, ignore_index, *options)[0]
    if reduction != "mean":
        return loss if total else loss.view(targets.shape)
    count = (targets != ignore_index).sum()
    # Dividing by zero would also give nan, but to the gradients as well.
    return torch.where(count > 0, loss / count.clamp(min=1), float("nan"))


def chunk_shape(tokens: int, vocab: int, most: int | None = None) -> tuple[int, int]:
    """Rows and columns of the one chunk of logits that is held: at most `most` tokens (None: 64 MiB), rows padded."""
    most = most or max(1, _CHUNK_BYTES // (4 * vocab))
    # Chunks of equal size: a small last one costs as much as a large one.
    rows = -(-tokens // max(1, -(-tokens // most)))
    return rows, -(-vocab // _ROW_MULTIPLE) * _ROW_MULTIPLE


@torch.library.custom_op("minigpt2::linear_cross_entropy", mutates_args=())
def _chunked(
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
    """The loss of every token (N,), or if `total` their sum (), and the gradients of hidden (N, C) and weight (V, C).

    They are those of the sum of the losses, each weighted by grad_losses (N,) where given; one that is not wanted is an
    empty tensor. dtype is that of the matrix products.
    """
    tokens, vocab = hidden.shape[0], weight.shape[0]
    losses, grad_hidden, grad_weight = _outputs(hidden, weight, dtype, False, want_hidden, want_weight)
    wide = losses.dtype
    counts = targets != ignore_index
    labels = torch.where(counts, targets, 0).unsqueeze(1)
    factors = torch.where(counts, 1.0 if grad_losses is None else grad_losses, 0.0).to(wide).unsqueeze(1)
    head = weight.to(dtype)
    chunk_size, width = chunk_shape(tokens, vocab, chunk_size)
    onednn = onednn_serves(chunk_size * head.numel(), hidden, head)  # which makes a chunk's memory itself, unpadded

    # All chunks share this memory. In lower precision the products need a copy of it in their dtype and a place for one
    # chunk's share of weight's gradient, which is summed in float32.
    padded = hidden.new_empty(0 if onednn else chunk_size, width, dtype=wide)
    narrow = padded if dtype == wide else torch.empty_like(padded, dtype=dtype)
    weight_sum = grad_weight if grad_weight.dtype == wide else torch.empty_like(grad_weight, dtype=wide)
    share = torch.empty_like(grad_weight, dtype=dtype) if dtype != wide else None
    weight_sum = weight_sum if tokens else weight_sum.zero_()  # without tokens no chunk will write it
    for start in range(0, tokens, max(1, chunk_size)):
        chunk = slice(start, start + chunk_size)
        label, factor, inputs = labels[chunk], factors[chunk], hidden[chunk].to(dtype)
        if onednn:
            probs = z = operand = None  # those of the last chunk make room
            probs = z = operand = multiply(inputs, head.t())
        else:
            probs = padded[: len(label)]
            z, operand = probs[:, :vocab], narrow[: len(label), :vocab]  # (n, V): the logits, and what is multiplied
            torch.mm(inputs, head.t(), out=operand)
            if dtype != wide:
                z.copy_(operand)
            probs[:, vocab:] = -torch.inf
        largest, logit = probs.amax(1), z.gather(1, label).squeeze(1)
        torch.softmax(probs, 1, out=probs)  # in place: the kernels finish a row's maximum and sum before they write it
        # The largest probability is exp(largest - logsumexp). It is at least 1 / V, so its logarithm is safe, unlike
        # the label's; and two maxima cost less than any other way to the logsumexp that needs no second chunk.
        losses[chunk] = largest - probs.amax(1).log() - logit
        if not (want_hidden or want_weight):
            continue
        z.scatter_(1, label, z.gather(1, label) - 1)
        if dtype != wide:
            operand.copy_(z)
        if want_hidden:
            grad_hidden[chunk] = multiply(operand, head) * factor
        if want_weight:
            # Scaling (n, C) inputs instead of (n, V) d spares a pass over the chunk.
            scaled = (inputs * factor).to(dtype)
            if share is None:
                add_transposed_product(weight_sum, operand, scaled, first=start == 0)
            else:
                torch.mm(operand.t(), scaled, out=share)
                weight_sum.add_(share) if start else weight_sum.copy_(share)
    losses.masked_fill_(~counts, 0)
    grad_weight = grad_weight if grad_weight is weight_sum else grad_weight.copy_(weight_sum)
    return losses.sum() if total else losses, grad_hidden, grad_weight


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
    ctx.set_materialize_grads(False)  # else the engine would make zeros (V, C) for the gradient of a gradient
    ctx.save_for_backward(*(output[1:] if ctx.total else (hidden, weight, targets)))


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "linear_cross_entropy has no second derivative; torch.nn.functional.cross_entropy of the logits has one"
        )
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    want_hidden, want_weight, *others = ctx.needs_input_grad
    if ctx.total:
        # In place, which spares fresh memory of weight's size, unless the graph is kept to be walked once more or is
        # being traced (compilers reuse memory).
        scale = torch.mul if backward_keeps_graph() or type(grad_loss) is not Tensor else Tensor.mul_
        grad_hidden, grad_weight = (scale(grad, grad_loss) for grad in ctx.saved_tensors)
    else:
        hidden, weight, targets = ctx.saved_tensors
        want = (False, want_hidden, want_weight)
        _, grad_hidden, grad_weight = _chunked(hidden, weight, targets, grad_loss, *ctx.settings, *want)
    return grad_hidden if want_hidden else None, grad_weight if want_weight else None, *(None for _ in others)


_chunked.register_fake(lambda h, w, t, g, i, c, dtype, total, *want: _outputs(h, w, dtype, total, *want))
_chunked.register_autograd(_backward, setup_context=_save)
