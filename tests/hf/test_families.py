"""Every family, everything generate does: at full rank as if matkv were not there, at ragged ranks
as if the model itself were truncated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import matkv
from coded import KINDS, Coded, coded, lent, room
from matkv.cache.layer import LatentLayer
from matkv.errors import CacheError
from tiny import (
    FAMILIES,
    Tiny,
    build,
    greedy,
    largest_difference,
    left_padded,
    seeded,
    stepwise,
    tiny,
    tokens,
)

TOLERANCE = 1e-5
EXACT = [(0, 0), (3, 0), (0, 5), (3, 5)]
PROMPTS = [tokens(1, 13, seed=1), tokens(1, 20, seed=2), tokens(1, 7, seed=3)]
# Repeats itself, so that prompt lookup finds candidates; most are then rejected, and cropped.
REPEATING = tokens(1, 9, seed=4).repeat(1, 3)


def new_tokens(out: Tensor, prompt: Tensor) -> list[list[int]]:
    continuation: list[list[int]] = out[:, prompt.shape[1] :].tolist()
    return continuation


# ---- at full rank


@torch.no_grad()
def test_full_rank_gives_the_logits_of_sdpa(any_family: Tiny) -> None:
    ids, mask = left_padded(PROMPTS)
    before = any_family.model(ids, attention_mask=mask).logits
    any_family.attach()
    after = any_family.model(ids, attention_mask=mask).logits
    assert largest_difference(after[mask.bool()], before[mask.bool()]) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"num_beams": 3, "num_return_sequences": 2}, id="sequences"),
        pytest.param({"do_sample": True, "top_k": 20, "temperature": 1.3}, id="sampling"),
    ],
)
def test_full_rank_generates_the_same_tokens(family: Tiny, options: dict[str, Any]) -> None:
    ids, mask = left_padded(PROMPTS)

    def run() -> list[Tensor]:
        with seeded(0):
            settings = {"max_new_tokens": 16 if options else 64, "do_sample": False, **options}
            alone = family.model.generate(PROMPTS[0], **settings)
            batch = family.model.generate(ids, attention_mask=mask, **settings)
        return [alone, batch]

    before = run()
    family.attach()
    after = run()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- at ragged ranks


@pytest.mark.parametrize(("sink", "recent"), EXACT)
@torch.no_grad()
def test_cached_decoding_equals_the_truncated_model(
    any_family: Tiny, sink: int, recent: int
) -> None:
    ids = tokens(2, 30)
    model = any_family.attach(ranks=any_family.ragged(), sink=sink, recent=recent)
    uncached = model(ids, use_cache=False).logits
    full = matkv.detach(model)(ids).logits
    any_family.attach(ranks=any_family.ragged(), sink=sink, recent=recent)
    cached = stepwise(model, ids, (7, 12))
    assert largest_difference(cached, uncached) < room(any_family, TOLERANCE)
    assert largest_difference(uncached, full) > 1e-2


@pytest.mark.parametrize(("sink", "recent"), EXACT)
@torch.no_grad()
def test_a_padded_batch_equals_each_sequence_alone(family: Tiny, sink: int, recent: int) -> None:
    model = family.attach(ranks=family.ragged(1), sink=sink, recent=recent)
    ids, mask = left_padded(PROMPTS)
    batch = stepwise(model, ids, (9, 4), mask_BT=mask)
    for row, prompt in enumerate(PROMPTS):
        alone = model(prompt, use_cache=False).logits
        found = batch[row : row + 1, -prompt.shape[1] :]
        assert largest_difference(found, alone) < room(family, TOLERANCE)


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (3, 5)])
def test_generation_in_a_padded_batch_equals_generation_alone(
    family: Tiny, sink: int, recent: int
) -> None:
    model = family.attach(ranks=family.ragged(2), sink=sink, recent=recent)
    ids, mask = left_padded(PROMPTS)
    batch = new_tokens(greedy(model, ids, attention_mask=mask), ids)
    alone = [new_tokens(greedy(model, prompt), prompt)[0] for prompt in PROMPTS]
    assert batch == alone


@pytest.mark.parametrize(
    ("recent", "options"),
    [
        pytest.param(4, {"use_cache": False}, id="no-cache"),
        pytest.param(4, {"prefill_chunk_size": 6}, id="chunked-prefill"),
        pytest.param(0, {"prompt_lookup_num_tokens": 5}, id="prompt-lookup"),
        pytest.param(4, {"prompt_lookup_num_tokens": 5}, id="prompt-lookup-window"),
    ],
)
def test_every_way_to_generate_gives_the_same_tokens(
    family: Tiny, recent: int, options: dict[str, Any]
) -> None:
    model = family.attach(ranks=family.ragged(3), sink=2, recent=recent)
    plain = greedy(model, REPEATING, 24)
    assert torch.equal(greedy(model, REPEATING, 24, **options), plain)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 5}])
def test_a_cache_given_to_generate_is_used(gemma3: Tiny, options: dict[str, Any]) -> None:
    model = gemma3.attach(ranks=gemma3.ragged(3), sink=2, recent=4)
    cache = matkv.LatentCache(model)
    out = greedy(model, REPEATING, 24, past_key_values=cache, **options)
    assert torch.equal(out, greedy(model, REPEATING, 24))
    assert cache.get_seq_length() == out.shape[1] - 1


@pytest.mark.parametrize(("attached_assistant", "recent"), [(False, 0), (True, 4)])
def test_assisted_generation_gives_the_same_tokens(
    family: Tiny, attached_assistant: bool, recent: int
) -> None:
    model = family.attach(ranks=family.ragged(3), recent=recent)
    plain = greedy(model, REPEATING, 24)
    assistant = build("llama")
    if attached_assistant:
        matkv.attach(assistant, tiny("llama").artifact, 0.5, recent=recent)
    assert torch.equal(greedy(model, REPEATING, 24, assistant_model=assistant), plain)


@pytest.mark.parametrize("exit_after", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma3_rings"])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_by_early_exit_give_the_same_tokens(kind: str, name: str, exit_after: int) -> None:
    """The first layer alone may be one that is not compressed."""
    for subject in lent(kind, name):
        model = subject.attach(ranks=subject.ragged(3), sink=2, recent=3)
        plain = greedy(model, REPEATING, 12)
        assert torch.equal(greedy(model, REPEATING, 12, assistant_early_exit=exit_after), plain)


def test_a_prefilled_prefix_serves_two_continuations(family: Tiny) -> None:
    model = family.attach(ranks=family.ragged(4), sink=2, recent=3)
    prefix = tokens(1, 15, seed=5)
    prefilled = matkv.LatentCache(model)
    with torch.no_grad():
        model(prefix, past_key_values=prefilled)
    for seed in (6, 7):
        prompt = torch.cat((prefix, tokens(1, 5, seed=seed)), dim=1)
        reused = greedy(model, prompt, past_key_values=copy.deepcopy(prefilled))
        assert torch.equal(reused, greedy(model, prompt))
    assert prefilled.get_seq_length() == 15


def test_generation_goes_on_where_it_stopped(family: Tiny) -> None:
    model = family.attach(ranks=family.ragged(5), recent=3)
    whole = greedy(model, PROMPTS[0], 12)
    first = model.generate(
        PROMPTS[0], max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    rest = greedy(model, first.sequences, 7, past_key_values=first.past_key_values)
    assert torch.equal(rest, whole)


def test_generation_makes_latent_layers_by_itself(family: Tiny) -> None:
    model = family.attach(budget=0.5)
    out = model.generate(
        PROMPTS[0], max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    layers = out.past_key_values.layers
    latent = [index for index, layer in enumerate(layers) if isinstance(layer, LatentLayer)]
    assert tuple(latent) == family.geometry.compressed


# ---- gradients and number formats


@pytest.mark.parametrize(("sink", "recent", "most"), [(0, 0, 0.0), (1, 2, TOLERANCE)])
def test_gradients_modes_agree(family: Tiny, sink: int, recent: int, most: float) -> None:
    """With exact tokens, gradients ask for explicit scores."""
    model = family.attach(ranks=family.ragged(6), sink=sink, recent=recent)
    ids = tokens(2, 12)
    with torch.no_grad():
        plain = model(ids).logits
    with torch.inference_mode():
        inference = model(ids).logits
    assert torch.equal(inference, plain)
    assert largest_difference(model(ids).logits.detach(), plain) <= most


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (2, 3)])
def test_gradients_through_the_cache_are_those_without_it(
    ranked_family: Tiny, sink: int, recent: int
) -> None:
    model = ranked_family.attach(ranks=ranked_family.ragged(7), sink=sink, recent=recent)
    ids = tokens(2, 12)
    parameters = list(model.parameters())

    def gradients(logits: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True)

    cache = matkv.LatentCache(model)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split((5, 4, 1, 2), 1)]
    pairs = zip(
        gradients(torch.cat(pieces, 1)),
        gradients(model(ids, use_cache=False).logits),
        strict=True,
    )
    for cached, uncached in pairs:
        if cached is None or uncached is None:
            assert cached is uncached
        else:
            assert largest_difference(cached, uncached) <= 1e-4 * float(uncached.abs().max())


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_close(
    family: Tiny, dtype: torch.dtype, sink: int, recent: int
) -> None:
    options: dict[str, Any] = {"ranks": family.ragged(8), "sink": sink, "recent": recent}
    ids = tokens(2, 16)
    exact = family.attach(**options)(ids).logits
    matkv.detach(family.model)
    half = copy.deepcopy(family.model).to(dtype)
    noise = largest_difference(half(ids).logits, family.model(ids).logits)
    matkv.attach(half, family.artifact, **options)
    most = 3 * noise
    if isinstance(family, Coded):  # rounding moves codes by a whole step: less than they all lose
        most = max(most, largest_difference(family.model(ids).logits, exact))
    assert largest_difference(stepwise(half, ids, (5, 3)), exact) < most
    assert greedy(half, ids, 4).shape == (2, 20)


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (2, 3)])
@torch.no_grad()
def test_autocast_stays_close(family: Tiny, sink: int, recent: int) -> None:
    ids = tokens(2, 16)
    exact_full = family.model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        noise = largest_difference(family.model(ids).logits, exact_full)
    model = family.attach(ranks=family.ragged(8), sink=sink, recent=recent)
    exact, most = model(ids).logits, 3 * noise
    if isinstance(family, Coded):  # see `test_half_precision_stays_close`
        most = max(most, largest_difference(exact_full, exact))
    with torch.autocast("cpu", torch.bfloat16):
        assert largest_difference(stepwise(model, ids, (5, 3)), exact) < most


def test_codes_pass_no_gradient_on_and_say_so() -> None:
    subject = coded("llama")
    model = subject.attach(ranks=subject.ragged(1))
    try:
        logits = model(tokens(2, 9)).logits
        with pytest.raises(CacheError, match="codes in a cache pass no gradient on"):
            logits.square().mean().backward()
    finally:
        matkv.detach(model)
        model.zero_grad()


def test_families_have_grouped_heads_where_they_can() -> None:
    grouped = {
        name
        for name in FAMILIES
        if tiny(name).geometry.query_heads > tiny(name).geometry.layers[0].kv_heads
    }
    assert grouped == set(FAMILIES) - {"gpt_neox"}


@torch.no_grad()
def test_sequences_of_several_growths_stay_right() -> None:
    """A cache that outgrows its buffer many times, against the truncated model."""
    model, artifact = build("llama"), tiny("llama").artifact
    ids = tokens(1, 200)
    matkv.attach(model, artifact, ranks=tiny("llama").ragged(9), recent=70)
    uncached = model(ids, use_cache=False).logits
    assert largest_difference(stepwise(model, ids, (3, 90)), uncached) < TOLERANCE
