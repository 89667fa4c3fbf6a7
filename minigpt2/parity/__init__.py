"""Whether minigpt2 computes what transformers computes from the same files, and if not, which module differs first.

Two programs that round differently do not agree to the bit. So there are three sides: minigpt2 and transformers in the
dtype that is asked for, and transformers in float64, which shows how far rounding alone takes transformers. Where that
is e, an error of 3 e in minigpt2 is taken for rounding too, so that the two may be 4 e apart (`TIMES`), and one last
digit (eps of the dtype) more, since transformers may be exact by chance. Errors are relative to the norm in float64 of
the vector at the same position of the text, and the worst position counts; those of losses and gradients to the norm of
the whole. Nothing finer measures float64 itself: there the bound is 1e-12, 4500 of its last digits, which is as much as
an error of 5e-4 would be in float32, and far less than a fault makes. The coarser the dtype, the larger a fault must be
to show.

A fault is found by giving each module the same input, what float64 has there. If it answers differently, or has other
weights, it is at fault. If the modules of a block agree and are given something else, its wiring is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt2.data.batches import open_tokens
from minigpt2.data.documents import DataError, read_pieces
from minigpt2.extras import import_extra
from minigpt2.generate import NonFiniteError, nonfinite
from minigpt2.model import GPT2
from minigpt2.ops.attention import resolve_backend
from minigpt2.parity.exact import Call, Exact, answer, gradients, in_float64, recorded, run
from minigpt2.parity.report import FLOAT64_BOUND, TIMES, Parity, Row, compare_tensors
from minigpt2.recompute import RECOMPUTE
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer
from minigpt2.weights import find_folder

__all__ = ["Parity", "Row", "compare", "parity"]

SEQUENCES, LENGTH, NEW_TOKENS = 2, 256, 32


def parity(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    data: str | Path | None = None,
    length: int = LENGTH,
    say: Callable[[str], None] = print,
) -> Parity:
    """Load the same files with transformers (eager attention) and with minigpt2, on the CPU, and compare the two.

    The text is 2 sequences of `length` tokens (or of the context length, if that is less) of `data`, a text, a folder
    of texts or a token file; by default of the sources of Python's standard library. Raises ValueError for files, text
    or settings that cannot serve, and MissingExtra, which is one, without transformers.
    """
    transformers = import_extra("parity", "transformers", "minigpt2 parity")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = find_folder(name_or_path)
    ours = GPT2.from_pretrained(folder, dtype=dtype, attention=attention)
    if (problem := nonfinite(ours)) is not None:
        raise ValueError(f"{name_or_path}: {problem}")
    own_dtype, config = ours.wte.weight.dtype, ours.config
    try:
        resolve_backend(attention, "cpu", own_dtype, config.head_dim)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    ids = _text(data, min(length, config.n_positions))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        folder,
        dtype=own_dtype,
        attn_implementation="eager",
        reorder_and_upcast_attn=False,  # the same function; True would compute it in float32 also in float64
        local_files_only=True,
        use_safetensors=True,
    ).eval()
    say(f"{name_or_path} in {dtype}: minigpt2, attention {attention}; transformers {transformers.__version__}, eager")
    source = data or "the Python standard library's own sources"
    modulo = f", ids modulo the vocabulary of {config.vocab_size}" if config.vocab_size <= END_OF_TEXT else ""
    say(f"text: {len(ids)} x {ids.size(1)} tokens of {source}{modulo}")
    found = compare(ours, theirs, ids % config.vocab_size, decode=None if modulo else _decode, say=say)
    found.numbers |= {"model": str(name_or_path), "dtype": dtype, "attention": attention, "text": str(source)}
    return found


def compare(
    ours: GPT2,
    theirs: Any,
    ids: Tensor,
    *,
    decode: Callable[[list[int]], str] | None = None,
    say: Callable[[str], None] = print,
) -> Parity:
    """Compare a model with transformers' GPT2LMHeadModel, both of one dtype, on the CPU and in evaluation mode, on the
    token ids (B, T), T >= 2. `decode` makes text of ids, to be shown."""
    found = Parity(say)
    exact = _forward(found, ours, theirs, ids)
    _loss_and_gradients(found, ours, theirs, ids, exact)
    _greedy(found, ours, theirs, ids[:1, : min(16, ids.size(1) // 2)], _tie(exact), decode)
    _padded(found, ours, theirs, ids[:, :64])
    _dial(found, ours, ids[:1, :33])
    say(found.verdict)
    return found


@torch.no_grad()
def _forward(found: Parity, ours: GPT2, theirs: Any, ids: Tensor) -> Exact:
    """Weights, the residual stream after each block, every module by itself, logits."""
    body, exact = theirs.transformer, run(theirs, ids)
    unequal = _unequal_parameters(ours, theirs)
    for name in unequal:
        if name.split(".")[0] in ("wte", "wpe"):
            found.expect(False, name.split(".")[0], f"{name} is not what transformers has")
    with recorded({str(i): block for i, block in enumerate(ours.h)}) as calls:
        logits = ours(ids)
    found.say(f"parameters that are not equal bit for bit: {', '.join(unequal) or 'none'}\n")
    found.say(
        f"{'residual stream after':24} {'largest':>9} {'relative':>9} {'bound':>9}   each module alone / its bound"
    )
    table: list[dict[str, Any]] = []
    for i, stream in enumerate(exact.streams):
        modules: list[Row] = []
        if i == 0:
            row = compare_tensors("wte + wpe", calls["0"].input, exact.calls[0].input, stream)
        else:
            name, call = f"h.{i - 1}", exact.calls[i - 1]
            modules = _modules(found, name, ours.h[i - 1], body.h[i - 1], call, exact.streams[i - 1], unequal)
            row = compare_tensors(name, calls[str(i - 1)].output, call.output, stream)
        found.expect_close(row, row.part, "the residual stream is another")
        found.say(f"{row} " + " ".join(f"{m.part.split('.')[-1]} {m.share:.2g}" for m in modules))
        table.append(row._asdict() | {"modules": [m._asdict() for m in modules]})
    over = next((row["part"] for row in table if not row["relative"] <= row["bound"]), None)
    found.say(f"first over its bound: {over or 'none'}\n")
    _alone(found, "ln_f", ours.ln_f, body.ln_f, in_float64(body.ln_f), exact.streams[-1], None, unequal)
    for name in unequal:  # also those of no module that both have
        found.expect(False, name.rpartition(".")[0], f"{name} is not what transformers has")
    row = compare_tensors("logits", logits, exact.rounded, exact.logits)
    found.expect_close(row, "lm_head", "the logits are others")
    top, expected = logits.argmax(-1), exact.rounded.argmax(-1)
    wrong = int(((top != expected) & (_gap(exact.logits, top, expected) > _tie(exact))).sum())
    found.expect(not wrong, "lm_head", f"{wrong} of {top.numel()} top-1 tokens differ, and are no ties")
    agreement = (top == expected).double().mean().item()
    found.say(f"{row}\ntop-1 agreement: {agreement:.2%} of {top.numel()} positions")
    found.numbers |= {"unequal_parameters": unequal, "residual_stream": table, "first_over_bound": over}
    found.numbers |= {"logits": row._asdict(), "top1_agreement": agreement}
    return exact


def _modules(
    found: Parity, name: str, ours: nn.Module, theirs: nn.Module, call: Call, stream: Tensor, unequal: list[str]
) -> list[Row]:
    """The modules of a block: each alone, and what the block gives to it when it is given the exact stream."""
    theirs64, rounded, rows = in_float64(theirs), stream.to(call.output.dtype), []
    with recorded(dict(ours.named_children())) as mine:
        answer(ours, rounded)
    with recorded(dict(theirs.named_children())) as others:
        answer(theirs, rounded, call)
    with recorded(dict(theirs64.named_children())) as exact:
        answer(theirs64, rounded.double(), call)
    for part, reference in exact.items():
        whole = f"{name}.{part}"
        if part not in mine:
            found.expect(False, whole, "minigpt2 does not call it")
            continue
        pair = getattr(ours, part), getattr(theirs, part)
        rows.append(_alone(found, whole, *pair, getattr(theirs64, part), reference.input, others[part], unequal))
        given = compare_tensors(whole, mine[part].input, others[part].input, reference.input)
        found.expect_close(given, whole, "the block gives it another input, though what comes before agrees")
    return rows


def _alone(
    found: Parity,
    name: str,
    ours: nn.Module,
    theirs: nn.Module,
    theirs64: nn.Module,
    x: Tensor,
    call: Call | None,
    unequal: list[str],
) -> Row:
    """What a module makes of the input x, rounded to its dtype."""
    for parameter in unequal:
        found.expect(not parameter.startswith(f"{name}."), name, f"{parameter} is not what transformers has")
    if isinstance(theirs64, nn.LayerNorm):  # also inputs as small as epsilon, which counts for nothing in large ones
        x = torch.cat([x, x * (theirs64.eps / x.var(-1, correction=0, keepdim=True).clamp(min=1e-30)).sqrt()])
    x = x.to(next(theirs.parameters()).dtype)
    row = compare_tensors(name, answer(ours, x), answer(theirs, x, call), answer(theirs64, x.double(), call))
    found.expect_close(row, name, "given the same input it answers differently")
    return row


def _loss_and_gradients(found: Parity, ours: GPT2, theirs: Any, ids: Tensor, exact: Exact) -> None:
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        each = ours.loss(inputs, targets, reduction="none")
        rounded, reference = (
            F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
            for logits in (exact.rounded.to(each.dtype), exact.logits)
        )
    row = compare_tensors("loss of each token", each, rounded, reference, whole=True)
    found.expect_close(row, "loss", "the losses are others")
    mean = ours.loss(inputs, targets)
    logits = theirs(ids, use_cache=False).logits[:, :-1]  # whose loss transformers takes in float32, even of float64
    expected = F.cross_entropy(logits.flatten(0, 1).to(each.dtype), targets.flatten())
    # Means can be no further apart, relative to the root mean square, than the norms of what they are taken of.
    bound = row.bound * reference.square().mean().sqrt().item()
    said = f"the mean loss is {mean.item():.8f}, in transformers {expected.item():.8f}"
    found.expect(abs(mean.item() - expected.item()) <= bound, "loss", said)
    perplexities = [math.exp(min(loss.item(), 700)) for loss in (mean, expected)]
    found.say(f"{row}\n{said}; perplexity {perplexities[0]:.6g} and {perplexities[1]:.6g}\n")
    found.numbers["loss"] = row._asdict() | {"minigpt2": mean.item(), "transformers": expected.item()}

    mean.backward()
    expected.backward()
    actual, theirs_by_name, rows = dict(ours.named_parameters()), _parameters(theirs), []
    for name, gradient in gradients(theirs, ids, exact):
        mine, other = actual[name].grad if name in actual else None, theirs_by_name[name].grad
        if mine is None or other is None:
            found.expect(False, name, "only one of the two has a gradient of it")
            continue
        rows.append(compare_tensors(name, mine, other, gradient, whole=True))
        found.expect_close(rows[-1], name, "its gradient is another")
    ours.zero_grad()
    theirs.zero_grad()
    rows.sort(key=lambda row: row.share, reverse=True)
    found.say(f"the worst of {len(rows)} gradients:\n" + "\n".join(map(str, rows[:5])) + "\n")
    found.numbers["gradients"] = [row._asdict() for row in rows]


@torch.no_grad()
def _greedy(
    found: Parity,
    ours: GPT2,
    theirs: Any,
    prompt: Tensor,
    tie: float,
    decode: Callable[[list[int]], str] | None,
) -> None:
    """The likeliest continuation, from the caches of both. Where two tokens are as likely, it may go on differently."""
    n = min(NEW_TOKENS, ours.config.n_positions - prompt.size(1))
    # A configuration of its own, or that of the folder would change what is likeliest, or when it ends.
    theirs.generation_config = type(theirs.generation_config)(do_sample=False, max_new_tokens=n, pad_token_id=0)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt))[0, prompt.size(1) :]
    try:
        tokens = ours.generate(prompt, n, temperature=0)[0, prompt.size(1) :]
    except NonFiniteError as error:
        found.expect(False, "greedy text", str(error))
        return
    equal = next((i for i in range(n) if tokens[i] != expected[i]), n)
    said = f"greedy text: {equal} of {n} tokens are equal"
    if equal < n:
        logits = run(theirs, torch.cat([prompt, expected[None, :equal]], dim=1)).logits[0, -1]
        gap = _gap(logits, tokens[equal], expected[equal]).item()
        said += f"; then come two whose logits are {gap:.2g} apart, where a tie is up to {tie:.2g}"
        found.expect(gap <= tie, "greedy text", said.removeprefix("greedy text: "))
    found.say(said + (f": {decode(tokens.tolist())!r}" if decode else ""))
    found.numbers["greedy"] = {"tokens": n, "equal": equal}


@torch.no_grad()
def _padded(found: Parity, ours: GPT2, theirs: Any, ids: Tensor) -> None:
    """A batch whose first row begins with padding. transformers is told the positions, which it does not derive from
    the mask."""
    mask = torch.ones_like(ids)
    mask[0, : -(-ids.size(1) // 3)] = 0
    exact = run(theirs, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    real = mask.bool()
    row = compare_tensors(
        "padded batch, logits", ours(ids, attention_mask=mask)[real], exact.rounded[real], exact.logits[real]
    )
    found.expect_close(row, "padded batch", "the logits are others")
    found.say(str(row))
    found.numbers["padded"] = row._asdict()


def _dial(found: Parity, ours: GPT2, ids: Tensor) -> None:
    """Loss and gradients at every notch, with dropout, beside those without recomputation."""
    dials, expected, differing, n = (ours.checkpoint_every, ours.recompute), None, list[str](), 0
    ours.train()
    for recompute in RECOMPUTE:
        for k in range(len(ours.h) + 1):
            ours.checkpoint_every, ours.recompute = k, recompute
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this attention is recomputed all the same
                torch.manual_seed(0)
                loss = ours.loss(ids[:, :-1], ids[:, 1:])
                loss.backward()
            results = [loss.detach(), *(p.grad for p in ours.parameters() if p.grad is not None)]
            ours.zero_grad()
            expected = expected or results
            n += 1
            if not all(map(torch.equal, results, expected)):
                differing.append(f"checkpoint_every={k}, recompute={recompute!r}")
    ours.eval()
    ours.checkpoint_every, ours.recompute = dials
    for notch in differing:
        found.expect(
            False, f"the dial at {notch}", "loss or gradients are not bit-equal to those without recomputation"
        )
    found.say(f"notches of the dial that are bit-equal: {n - len(differing)} of {n}\n")
    found.numbers["dial"] = {"notches": n, "differing": differing}


def _gap(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """How far the logits of the tokens a and b are apart."""
    return (logits.gather(-1, a[..., None]) - logits.gather(-1, b[..., None])).abs().squeeze(-1)


def _tie(exact: Exact) -> float:
    """How far the logits of two tokens may be apart for rounding to exchange them."""
    if exact.rounded.dtype == torch.float64:
        return 2 * FLOAT64_BOUND * exact.logits.abs().max().item()
    return 2 * (TIMES + 1) * (exact.rounded - exact.logits).abs().max().item()


def _parameters(theirs: Any) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): parameter for name, parameter in theirs.named_parameters()}


def _unequal_parameters(ours: GPT2, theirs: Any) -> list[str]:
    """The names of the parameters that are not the same bits, or that only one of the two has."""
    mine, others = dict(ours.named_parameters()), _parameters(theirs)
    both = others.keys() & mine.keys()
    return [name for name in others | mine if name not in both or not torch.equal(mine[name], others[name])]


def _text(data: str | Path | None, length: int) -> Tensor:
    """The first token ids of a text, (SEQUENCES, length), or less if there are fewer."""
    n, tokens = SEQUENCES * length, list[int]()
    if length < 2:
        raise ValueError(f"2 tokens are the least that have a loss; got a length of {length}")
    if data is not None and Path(data).suffix == ".bin":
        tokens = open_tokens(data)[:n].tolist()
    else:
        for piece in read_pieces(data):
            tokens += get_tokenizer().encode_ordinary(piece.text) + [END_OF_TEXT] * piece.ends
            if len(tokens) >= n:
                break
    length = min(length, len(tokens) // SEQUENCES)
    if length < 2:
        raise DataError(f"{data}: {len(tokens)} tokens are too few; {2 * SEQUENCES} are the least")
    return torch.tensor(tokens[: SEQUENCES * length]).view(SEQUENCES, length)


def _decode(ids: list[int]) -> str:
    return get_tokenizer().decode([i for i in ids if i <= END_OF_TEXT])  # a padded vocabulary has more
