"""Generation: the cache changes no logits, padding changes no row, and sampling draws from the stated distribution."""

import dataclasses
import itertools
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.func import functional_call

from minigpt2 import GPT2, GPT2Config, KVCache
from minigpt2.generate import Sampling, next_token_probabilities, stream

BACKENDS = ("eager", "sdpa", "auto")


@pytest.fixture(params=BACKENDS)
def model(request, hf_tiny):
    return GPT2.from_pretrained(hf_tiny, attention=request.param)


@pytest.fixture
def prompt():
    return torch.randint(0, 503, (2, 10), generator=torch.Generator().manual_seed(3))


def padded(*rows):
    """Rows of unequal length as (input_ids, attention_mask), padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def greedy_without_cache(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_equals_an_argmax_loop_without_a_cache(model, prompt):
    out = model.generate(prompt, 54, temperature=0)
    assert torch.equal(out, greedy_without_cache(model, prompt, 54))
    assert len(set(out[0].tolist())) > 5  # not one token over and over


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [3, 7], [9, 1], [1, 4, 5], [2, 3, 1, 4]], ids=str)
@torch.no_grad()
def test_a_prompt_fed_in_pieces_gives_the_logits_of_one_pass(model, prompt, pieces):
    model.double()
    cache = KVCache(model, 2, 10)
    logits = torch.cat([model(piece, cache=cache) for piece in prompt.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(prompt), rtol=1e-12, atol=1e-12)
    assert cache.length == 10


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [3, 7], [5, 1, 4]], ids=str)
@torch.no_grad()
def test_a_padded_prompt_fed_in_pieces_gives_the_logits_of_each_row_alone(model, prompt, pieces):
    model.double()
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    cache, logits, done = KVCache(model, 2), [], 0
    for piece in prompt.split(pieces, dim=1):
        done += piece.size(1)
        logits.append(model(piece, mask[:, :done], cache=cache))
    logits = torch.cat(logits, dim=1)
    torch.testing.assert_close(logits[:1], model(prompt[:1]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits[1:, 4:], model(prompt[1:, 4:]), rtol=1e-12, atol=1e-12)


def test_a_batch_padded_on_the_left_gives_each_row_what_it_gets_alone(model):
    rows = [[7, 8, 9, 10, 11, 12], [450], [3, 1, 2]]
    ids, mask = padded(*rows)
    out = model.generate(ids, 40, temperature=0, attention_mask=mask)
    for row, continued in zip(rows, out.tolist(), strict=True):
        alone = model.generate(torch.tensor([row]), 40, temperature=0)[0].tolist()
        assert continued[6:] == alone[len(row) :]


def test_a_mask_of_ones_and_a_boolean_mask_change_nothing(model, prompt):
    out = model.generate(prompt, 20, temperature=0)
    assert torch.equal(out, model.generate(prompt, 20, temperature=0, attention_mask=torch.ones_like(prompt)))
    ids, mask = padded([5, 6, 7], [8])
    out = model.generate(ids, 20, temperature=0, attention_mask=mask)
    assert torch.equal(out, model.generate(ids, 20, temperature=0, attention_mask=mask.bool()))


def test_sampling_with_a_generator_is_reproducible_and_leaves_the_global_state_alone(model, prompt):
    state = torch.get_rng_state()
    first, second, third = (
        model.generate(prompt, 30, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(state, torch.get_rng_state())


def test_top_k_of_one_is_greedy(model, prompt):
    assert torch.equal(model.generate(prompt, 20, top_k=1), model.generate(prompt, 20, temperature=0))


def test_tokens_are_drawn_with_their_probabilities(model):
    prompt = torch.full((20_000, 1), 17)
    with torch.no_grad():
        expected = next_token_probabilities(model(prompt[:1])[:, -1], temperature=0.5, top_k=5)[0]
    drawn = model.generate(prompt, 1, temperature=0.5, top_k=5, generator=torch.Generator().manual_seed(0))[:, 1]
    observed = torch.bincount(drawn, minlength=503) / len(drawn)
    assert (expected > 0).sum() == 5
    assert (observed - expected).abs().max() < 0.015  # more than 4 standard deviations


def naive(logits, temperature=1.0, top_k=None, top_p=None):
    """One row at a time, one token at a time, in Python's float64."""
    rows = []
    for row in logits.double().tolist():
        values = torch.tensor([x / temperature for x in row], dtype=torch.float64)
        kept = list(range(len(row)))
        if top_k is not None:
            kth = sorted(row, reverse=True)[:top_k][-1]
            kept = [i for i in kept if row[i] >= kth]
        p = values[kept].softmax(0).tolist()
        if top_p is not None:
            total, nucleus = 0.0, []
            for share, i in sorted(zip(p, kept, strict=True), key=lambda pair: (-pair[0], pair[1])):
                if total >= top_p:
                    break
                nucleus.append(i)
                total += share
            kept = nucleus
        out = torch.zeros(len(row), dtype=torch.float64)
        out[kept] = values[kept].softmax(0)
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 2, 17, 50, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.95, 1.0])
def test_the_distribution_is_that_of_a_naive_reference(temperature, top_k, top_p):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3
    ours = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(ours.double(), naive(logits, temperature, top_k, top_p), rtol=1e-5, atol=1e-7)


def test_tokens_tied_with_the_kth_are_all_kept():
    p = next_token_probabilities(torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]), top_k=2)[0]
    assert (p > 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(("top_p", "kept"), [(0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1.0, 4)])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
    p = next_token_probabilities(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), top_p=top_p)[0]
    assert (p > 0).tolist() == [i < kept for i in range(4)]


def test_the_nucleus_of_tied_tokens_is_no_larger_than_it_must_be():
    assert (next_token_probabilities(torch.zeros(1, 8), top_p=0.5) > 0).sum() == 4


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-300])
def test_a_temperature_near_zero_is_nearly_greedy(temperature):
    p = next_token_probabilities(torch.tensor([[30.0, 31.0, -5.0]]), temperature=temperature)
    assert p.tolist() == [[0.0, 1.0, 0.0]]


def sampled(model, prompt, **arguments):
    return model.generate(prompt, 40, generator=torch.Generator().manual_seed(1), **arguments)


def test_a_row_that_ended_is_filled_up_while_another_goes_on(model, prompt):
    free = sampled(model, prompt)
    eos = free[0, 14].item()
    assert eos not in free[1, 10:]
    out = sampled(model, prompt, eos_token_id=eos)
    end = free[0].tolist().index(eos, 10)
    assert torch.equal(out[0, : end + 1], free[0, : end + 1])
    assert set(free[0, end + 1 :].tolist()) != {eos} == set(out[0, end + 1 :].tolist())
    assert torch.equal(out[1], free[1])


def test_generation_ends_when_every_row_has(model, prompt):
    free = sampled(model, prompt[:1])
    eos = free[0, 14].item()
    end = free[0].tolist().index(eos, 10)
    assert torch.equal(sampled(model, prompt[:1], eos_token_id=eos), free[:, : end + 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k must be >= 1, got 2.5"),
        ({"top_p": "0.9"}, r"top_p must be in \(0, 1\], got '0.9'"),
        ({"temperature": -1, "top_k": 0, "top_p": 2}, "temperature .*; top_k .*; top_p "),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "on the left"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"\(B, T\)"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, r"\(B, T\)"),
        ({"input_ids": torch.zeros(1, 3)}, "int64"),
        ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "65 tokens exceed the context length n_positions=64"),
        ({"input_ids": torch.tensor([[1, 503]])}, r"503 is outside the vocabulary \[0, 503\)"),
        ({"input_ids": torch.tensor([[-1, 5]])}, "-1 is outside the vocabulary"),
    ],
)
def test_a_mistake_is_a_clear_error_before_the_first_token(tiny_model, arguments, message):
    arguments = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 4} | arguments
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(**arguments)
    with pytest.raises(ValueError, match=message):
        stream(tiny_model, **arguments)


def test_settings_are_one_frozen_value_that_generate_passes_on(tiny_model, prompt):
    assert Sampling() == Sampling(temperature=1.0, top_k=None, top_p=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().top_k = 3
    assert Sampling(np.float32(0.5), top_k=np.int64(3), top_p=1).top_k == 3
    with pytest.raises(TypeError, match="temprature"):
        tiny_model.generate(prompt, 1, temprature=0)


def test_the_context_limit_ends_a_generation_with_a_warning(tiny_model, prompt):
    with pytest.warns(UserWarning, match="context length of 64 tokens, after 54 of 60"):
        out = tiny_model.generate(prompt, 60, temperature=0)
    assert out.shape == (2, 64)
    with pytest.warns(UserWarning, match="after 0 of 1"):
        assert torch.equal(tiny_model.generate(out, 1), out)


def test_a_generation_that_just_fits_gives_no_warning(tiny_model, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiny_model.generate(prompt, 54).shape == (2, 64)
        assert torch.equal(tiny_model.generate(prompt, 0), prompt)


def test_dropout_is_off_and_the_mode_is_restored(tiny_model, prompt):
    expected = tiny_model.generate(prompt, 20, temperature=0)
    assert not tiny_model.training
    tiny_model.train()
    assert torch.equal(tiny_model.generate(prompt, 20, temperature=0), expected)
    assert all(module.training for module in tiny_model.modules())


def modes(model):
    return [module.training for module in model.modules()]


@pytest.fixture
def half_training(hf_tiny):
    """A model in training, with dropout, of which one block is not."""
    model = GPT2.from_pretrained(hf_tiny, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    model.h[1].eval()
    return model


def test_streams_leave_every_module_in_its_mode_whenever_they_are_left(half_training, tiny_model, prompt):
    before = modes(half_training)
    first, second = (stream(half_training, prompt, 8, temperature=0) for _ in range(2))
    drawn = [[next(first)], []]
    assert modes(half_training) == before
    drawn[1].append(next(second))
    half_training.eval()
    drawn[0].append(next(first))
    assert not any(modes(half_training))
    half_training.train()
    drawn[0] += list(first)  # the first ends while the second is under way
    assert all(modes(half_training))
    drawn[1].append(next(second))
    second.close()
    assert all(modes(half_training))
    expected = tiny_model.generate(prompt, 8, temperature=0)[:, 10:]
    assert torch.equal(torch.stack(drawn[0], 1), expected)
    assert torch.equal(torch.stack(drawn[1], 1), expected[:, :2])


def test_the_modes_are_restored_when_a_step_fails(half_training, prompt):
    def fail(module, inputs):
        raise KeyError("hook")

    before = modes(half_training)
    tokens = stream(half_training, prompt, 8)
    next(tokens)
    half_training.ln_f.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        next(tokens)
    assert modes(half_training) == before


def test_a_module_that_changes_its_weights_with_its_mode_is_not_asked_to(half_training, prompt):
    """As loralib's layers do, which merge their adapters in evaluation mode."""
    calls = []
    half_training.h[0].train = calls.append
    half_training.generate(prompt, 2)
    assert not calls


def test_tokens_of_a_stream_enter_a_loss(half_training, prompt):
    for token in stream(half_training, prompt, 2, generator=torch.Generator().manual_seed(0)):
        half_training.loss(prompt[:, :1], token[:, None]).backward()
        (half_training.wte(token) * token[:, None]).sum().backward()  # which keeps the token for the backward pass
        assert half_training.wte.weight.grad is not None


@pytest.mark.parametrize(
    "name", ["wte.weight", "wpe.weight", "h.1.mlp.c_fc.weight", "h.2.attn.c_attn.bias", "ln_f.bias"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_weights_that_are_not_finite_are_named(tiny_model, prompt, name, value, temperature):
    with torch.no_grad():
        tiny_model.get_parameter(name).view(-1)[5] = value
    with pytest.raises(ValueError, match=f"the logits are not finite: {name} holds a NaN or an infinity"):
        tiny_model.generate(prompt, 5, temperature=temperature)


def test_logits_that_overflow_say_so(tiny_model, prompt):
    with torch.no_grad():
        tiny_model.ln_f.weight.fill_(1e37)
        tiny_model.wte.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r"the logits are not finite: they overflow torch\.float32"):
        tiny_model.generate(prompt, 5)


def test_a_stream_yields_the_tokens_of_generate_one_at_a_time(tiny_model, prompt):
    drawn = []
    for token in stream(tiny_model, prompt, 20, generator=torch.Generator().manual_seed(0)):
        assert token.shape == (2,)
        assert torch.is_grad_enabled()
        drawn.append(token)
    expected = tiny_model.generate(prompt, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(drawn, dim=1), expected[:, 10:])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_dtype_of_the_ids_is_kept_and_the_result_can_be_trained_on(tiny_model, prompt, dtype):
    out = tiny_model.generate(prompt.to(dtype), 5, temperature=0)
    assert out.dtype == dtype
    out = out.long()
    tiny_model.loss(out[:, :-1], out[:, 1:]).backward()


def test_generation_in_half_precision(hf_tiny, prompt):
    model = GPT2.from_pretrained(hf_tiny, dtype=torch.bfloat16)
    assert model.generate(prompt, 5, top_p=0.9).shape == (2, 15)


def test_the_cache_is_allocated_once_at_the_stated_size(tiny_model, prompt):
    cache = KVCache(tiny_model, 2, 20)
    assert sum(layer.k.numel() + layer.v.numel() for layer in cache.layers) == 2 * 3 * 2 * 20 * 64
    places = [layer.k.data_ptr() for layer in cache.layers]
    with torch.no_grad():
        for i in range(10):
            tiny_model(prompt[:, i : i + 1], cache=cache)
    assert [layer.k.data_ptr() for layer in cache.layers] == places
    assert KVCache(tiny_model, 1).max_length == 64


LOW = pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)


def close_to(logits, reference, dtypes):
    """Whether logits are as near to those in float64 as a few roundings to the coarsest dtype leave them."""
    error = (logits.double() - reference).norm() / reference.norm()
    return error < 4 * max(torch.finfo(dtype).eps for dtype in dtypes)


@LOW
@pytest.mark.parametrize("pieces", [[10], [3, 1, 6], [9, 1]], ids=str)
@torch.no_grad()
def test_a_cache_under_autocast_gives_the_logits_of_autocast_without_one(model, prompt, pieces, low):
    with torch.autocast("cpu", low):
        cache = KVCache(model, 2)
        logits = torch.cat([model(piece, cache=cache) for piece in prompt.split(pieces, dim=1)], dim=1)
        assert close_to(logits, model(prompt).double(), [low])
    assert {layer.k.dtype for layer in cache.layers} == {low}
    assert close_to(logits, model.double()(prompt), [low])


@LOW
@pytest.mark.parametrize("steps", list(itertools.product([False, True], repeat=3)), ids=str)
@torch.no_grad()
def test_autocast_may_begin_and_end_between_the_calls_on_one_cache(model, prompt, steps, low):
    cache, logits = KVCache(model, 2), []
    for autocast, piece in zip(steps, prompt.split([4, 1, 5], dim=1), strict=True):
        with torch.autocast("cpu", low) if autocast else nullcontext():
            logits.append(model(piece, cache=cache))
    reference = model.double()(prompt)
    dtypes = [low if autocast else torch.float32 for autocast in steps]
    for i, (ours, theirs) in enumerate(zip(logits, reference.split([4, 1, 5], dim=1), strict=True)):
        assert close_to(ours, theirs, dtypes[: i + 1])  # what was stored before autocast began lost nothing


@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("then", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_a_cache_serves_a_model_whose_dtype_changes(model, prompt, made, first, then):
    reference = model.double()(prompt)
    cache = KVCache(model.to(made), 2)
    head = model.to(first)(prompt[:, :6], cache=cache)
    tail = model.to(then)(prompt[:, 6:], cache=cache)
    assert (head.dtype, tail.dtype) == (first, then)
    assert close_to(head, reference[:, :6], [made, first])
    assert close_to(tail, reference[:, 6:], [made, first, then])


@torch.no_grad()
def test_a_cache_follows_its_model_to_another_device(model, prompt):
    with torch.device("meta"):
        elsewhere = GPT2(model.config)
    cache = KVCache(elsewhere, 2)
    torch.testing.assert_close(model(prompt, cache=cache), model(prompt))
    assert {layer.k.device for layer in cache.layers} == {torch.device("cpu")}


@LOW
@pytest.mark.parametrize("rows", [1, 4])
@torch.no_grad()
def test_one_query_over_many_keys_in_low_precision(tiny_config, low, rows):
    """Enough keys for the kernel that serves one query, which leaves fewer than 128 to others."""
    torch.manual_seed(0)
    model = GPT2(tiny_config.replace(n_positions=140)).eval()
    ids = torch.randint(503, (rows, 135))
    with torch.autocast("cpu", low):
        cache = KVCache(model, rows)
        model(ids[:, :134], cache=cache)
        under_autocast = model(ids[:, 134:], cache=cache)
        assert model.generate(ids, 5, temperature=0).shape == (rows, 140)
    cache = KVCache(model.to(low), rows)
    model(ids[:, :134], cache=cache)
    in_low = model(ids[:, 134:], cache=cache)
    reference = model.double()(ids)[:, 134:]
    assert close_to(under_autocast, reference, [low])
    assert close_to(in_low, reference, [low])


def test_gradients_flow_through_the_tokens_of_one_call(tiny_model, prompt):
    """The gradient of a call on a filled cache is the slope of its loss where what the cache held is a constant."""
    model, name = tiny_model.double(), "h.1.attn.c_attn.weight"
    weight = model.get_parameter(name)

    def loss(moved):
        cache = KVCache(model, 2)
        with torch.no_grad():
            model(prompt[:, :6], cache=cache)
        return functional_call(model, {name: moved}, (prompt[:, 6:],), {"cache": cache}).square().mean()

    (gradient,) = torch.autograd.grad(loss(weight), weight)
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (loss(weight + 1e-6 * direction) - loss(weight - 1e-6 * direction)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


@torch.no_grad()
def test_a_cache_that_a_failed_call_left_half_filled_is_refused(tiny_model, prompt):
    def fail(module, inputs):
        raise KeyError("hook")

    cache = KVCache(tiny_model, 2)
    hook = tiny_model.h[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        tiny_model(prompt, cache=cache)
    hook.remove()
    with pytest.raises(ValueError, match="make a new cache"):
        tiny_model(prompt, cache=cache)


@pytest.mark.parametrize("change", [{"n_layer": 2}, {"n_layer": 4}, {"n_head": 1}, {"n_embd": 32}], ids=str)
@torch.no_grad()
def test_a_cache_of_another_model_is_refused(tiny_model, prompt, change):
    cache = KVCache(GPT2(tiny_model.config.replace(**change)), 2)
    with pytest.raises(ValueError, match=r"was made for \(n_layer, n_head, head_dim\) = .*, not \(3, 4, 16\)"):
        tiny_model(prompt, cache=cache)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_torch_leave_cache_and_sampling_alone(tiny_model, default, device):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    settings = Sampling(temperature=0.7, top_k=20, top_p=0.9)
    expected = settings.probabilities(logits)
    try:
        torch.set_default_dtype(default)
        torch.set_default_device(device)
        cache = KVCache(tiny_model, 2)
        probabilities = settings.probabilities(logits)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert {(layer.k.dtype, layer.k.device.type) for layer in cache.layers} == {(torch.float32, "cpu")}
    assert torch.equal(probabilities, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2, 0), "max_length"), ((2, 65), "n_positions=64"), ((0,), "batch_size"), ((-1,), "batch_size")],
)
def test_a_cache_of_impossible_size_is_refused(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        KVCache(tiny_model, *arguments)


@torch.no_grad()
def test_tokens_that_do_not_fit_a_cache_are_refused_and_leave_it_as_it_was(tiny_model, prompt):
    cache = KVCache(tiny_model, 2, 12)
    tiny_model(prompt[:, :8], cache=cache)
    with pytest.raises(ValueError, match="holds 8 of 12 tokens; 5 more do not fit"):
        tiny_model(prompt[:, :5], cache=cache)
    with pytest.raises(ValueError, match="made for 2 sequences, got 1"):
        tiny_model(prompt[:1, :1], cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 10\)"):
        tiny_model(prompt[:, 8:], torch.ones(2, 2), cache=cache)
    assert cache.length == 8
    torch.testing.assert_close(tiny_model(prompt[:, 8:], cache=cache), tiny_model(prompt)[:, 8:], rtol=1e-4, atol=1e-4)


def test_a_model_of_one_position_and_one_token():
    model = GPT2(GPT2Config(vocab_size=1, n_positions=1, n_embd=2, n_layer=1, n_head=1))
    with pytest.warns(UserWarning, match="after 0 of 3"):
        assert model.generate(torch.zeros(1, 1, dtype=torch.long), 3).tolist() == [[0]]


@torch.no_grad()
def test_a_cache_that_was_cut_or_expanded_is_served_by_the_operations_or_refused(tiny_model, prompt):
    expected = tiny_model(prompt[:1])
    cut, expanded, one = (KVCache(tiny_model, rows) for rows in (1, 3, 1))
    for cache in (cut, one):
        tiny_model(prompt[:1, :-1], cache=cache)
    for layer in cut.layers:
        layer.k, layer.v = layer.k[:, :, :12], layer.v[:, :, :12]
    torch.testing.assert_close(tiny_model(prompt[:1, -1:], cache=cut), expected[:, -1:])
    for layer, source in zip(expanded.layers, one.layers, strict=True):
        layer.k, layer.v, layer.length = source.k.expand(3, -1, -1, -1), source.v.expand(3, -1, -1, -1), source.length
    with pytest.raises(RuntimeError, match="single memory location"):  # PyTorch's own
        tiny_model(prompt[:1, -1:].repeat(3, 1), cache=expanded)
