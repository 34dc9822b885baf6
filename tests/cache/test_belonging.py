"""A cache belongs to an attachment: it follows, goes on with a word, or is refused.

Shapes: B batch, T token.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import matkv
from matkv.cache.cache import StaticLatentCache, use_latents
from matkv.errors import CacheError
from tiny import (
    Tiny,
    build,
    greedy,
    largest_difference,
    latent_layers,
    ragged_table,
    stepwise,
    tokens,
)

TOLERANCE = 5e-5
KINDS: dict[str, Callable[[Any], Any]] = {
    "growing": matkv.LatentCache,
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticLatentCache(model, 40),
}


def other(subject: Tiny, seed: int = 1) -> Tiny:
    """Another model of the same geometry, or the same one with other bases for seed 0."""
    model = build("llama", seed)
    return Tiny(model, matkv.calibrate(model, [tokens(4, 48, seed=8)]))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_that_was_reset_follows_the_model(llama: Tiny, kind: str) -> None:
    model = llama.attach(ranks=llama.ragged(1))
    cache, ids = KINDS[kind](model), tokens(2, 20)
    stepwise(model, ids, (9,), cache)
    cache.reset()
    exact: dict[str, int] = {} if kind == "static" else {"sink": 2, "recent": 3}
    llama.attach(ranks=llama.ragged(2), **exact)
    assert largest_difference(stepwise(model, ids, (9,), cache), model(ids).logits) < TOLERANCE
    cache.reset()
    stranger = other(llama)
    stranger.attach(budget=0.5)
    out = stepwise(stranger.model, ids, (9,), cache)
    assert largest_difference(out, stranger.model(ids).logits) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_tokens_of_another_model_or_other_bases_are_refused(
    llama: Tiny, kind: str, seed: int
) -> None:
    model, ids = llama.attach(ranks=llama.ragged(1)), tokens(1, 12)
    expected = stepwise(model, ids, (9,))
    cache = KINDS[kind](model)
    out = [model(ids[:, :9], past_key_values=cache).logits]
    stranger = other(llama, seed)
    stranger.attach(ranks=ragged_table(llama.geometry, 1))
    with pytest.raises(CacheError, match="of another model or of other bases"):
        stranger.model(ids[:, 9:], past_key_values=cache)
    out.append(model(ids[:, 9:], past_key_values=cache).logits)
    assert largest_difference(torch.cat(out, 1), expected) < TOLERANCE


@torch.no_grad()
def test_a_cache_that_outlives_its_ranks_says_so_once(
    llama: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = llama.attach(budget=0.25), tokens(1, 12)
    cache = matkv.LatentCache(model)
    stepwise(model, ids[:, :6], (6,), cache)
    with caplog.at_level(logging.WARNING):
        llama.attach(budget=0.25)
        stepwise(model, ids[:, 6:8], (), cache)
        assert not caplog.messages
        llama.attach(budget=0.5)
        stepwise(model, ids[:, 8:], (), cache)
    assert [text for text in caplog.messages if "the ranks it was filled at" in text] == [
        caplog.messages[0]
    ]


def test_a_cache_of_other_layers_is_refused_and_left_alone(llama: Tiny, gemma3: Tiny) -> None:
    gemma3.attach(budget=0.5)
    llama.attach(budget=0.5)
    cache = matkv.LatentCache(gemma3.model)
    kinds = [type(layer) for layer in cache.layers]
    with pytest.raises(CacheError, match="layer 0 of the LatentCache cannot take latents"):
        llama.model(tokens(1, 3), past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == kinds
    cache = matkv.LatentCache(llama.model)
    with pytest.raises(CacheError, match="layer 0 of the LatentCache cannot take latents"):
        gemma3.model(tokens(1, 3), past_key_values=cache)


@torch.no_grad()
def test_use_latents_changes_nothing_that_fits(llama: Tiny) -> None:
    model = llama.attach(budget=0.5)
    cache = matkv.LatentCache(model)
    model(tokens(1, 3), past_key_values=cache)
    layers = list(cache.layers)
    use_latents(cache, model)
    assert all(one is other for one, other in zip(cache.layers, layers, strict=True))


# ---- copies


COPIES: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "model and cache": lambda model, cache: copy.deepcopy((model, cache)),
    "cache and model": lambda model, cache: copy.deepcopy((cache, model))[::-1],
    "one by one": lambda model, cache: (copy.deepcopy(model), copy.deepcopy(cache)),
    "pickled": lambda model, cache: pickle.loads(pickle.dumps((model, cache))),
    "pickled cache": lambda model, cache: (model, pickle.loads(pickle.dumps(cache))),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (2, 3)])
@torch.no_grad()
def test_copies_of_model_and_cache_go_on_by_themselves(
    llama: Tiny, name: str, sink: int, recent: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent), tokens(2, 14)
    expected = model(ids).logits[:, 9:]
    cache = matkv.LatentCache(model)
    model(ids[:, :9], past_key_values=cache)
    twin, held = COPIES[name](model, cache)
    out = twin(ids[:, 9:], past_key_values=held).logits
    assert largest_difference(out, expected) < TOLERANCE
    assert not caplog.messages
    modules = {id(module) for module in twin.modules()}
    assert all(id(layer.projection) in modules for layer in latent_layers(held))
    assert cache.get_seq_length() == 9
    out = model(ids[:, 9:], past_key_values=cache).logits
    assert largest_difference(out, expected) < TOLERANCE


# ---- modes


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (2, 0), (0, 3), (2, 3)])
@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_steps_under_autocast_after_a_prompt_outside_and_the_reverse(
    llama: Tiny, sink: int, recent: int, first: bool
) -> None:
    ids = tokens(2, 16)

    def logits() -> torch.Tensor:
        cache, outs = None, []
        for step, piece in enumerate(ids.split((7, 1, 1, 4, 1, 2), dim=1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=(step < 2) == first):
                out = llama.model(piece, past_key_values=cache)
            outs.append(out.logits.float())
            cache = out.past_key_values
        return torch.cat(outs, dim=1)

    exact = llama.model(ids).logits
    noise = largest_difference(logits(), exact)
    assert noise > 1e-3
    llama.attach(sink=sink, recent=recent)
    assert largest_difference(logits(), exact) < 2 * noise


def test_a_model_attached_in_inference_mode_can_be_trained(ranked_llama: Tiny) -> None:
    llama = ranked_llama
    with torch.inference_mode():
        llama.attach(ranks=llama.ragged(1), sink=2, recent=3)
        greedy(llama.model, tokens(1, 5), 3)
    llama.model(tokens(2, 9)).logits.square().mean().backward()
    weight = llama.model.model.layers[0].self_attn.k_proj.weight
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)
    llama.model.zero_grad()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_checkpointing_returns_no_cache_as_without_latents(llama: Tiny) -> None:
    model = build("llama")
    model.train()
    model.gradient_checkpointing_enable()
    plain = model(tokens(1, 5)).past_key_values
    matkv.attach(model, llama.artifact, 0.5)
    assert model(tokens(1, 5)).past_key_values is plain is None
    model.eval()
    assert isinstance(model(tokens(1, 5)).past_key_values, matkv.LatentCache)


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (2, 3)])
def test_drafts_by_early_exit_give_the_same_tokens(llama: Tiny, sink: int, recent: int) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent)
    ids = tokens(1, 5).repeat(1, 4)
    expected = greedy(model, ids, 12)
    assert torch.equal(greedy(model, ids, 12, assistant_early_exit=2), expected)
