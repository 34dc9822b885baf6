"""Layers with a sliding window that are compressed: they hold their window, and no more."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, StaticCache

import matkv
from coded import KINDS, lent, room
from matkv.cache.cache import StaticLatentCache, refill
from matkv.cache.sliding import SlidingLatentLayer, SlidingStaticLatentLayer
from matkv.errors import CacheError
from tiny import Tiny, greedy, largest_difference, left_padded, stepwise, tokens

EXACT = pytest.mark.parametrize(("sink", "recent"), [(0, 0), (3, 0), (0, 5), (3, 5), (2, 40)])
WINDOW = 9


@pytest.fixture(params=KINDS)
def rings(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    """Every second layer has a window of `WINDOW` tokens, and is compressed."""
    yield from lent(request.param, "gemma3_rings")


def sliding(cache: Any) -> list[SlidingLatentLayer]:
    return [layer for layer in cache.layers if isinstance(layer, SlidingLatentLayer)]


@torch.no_grad()
def feed(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, past_key_values=cache).logits
    return logits


@EXACT
@torch.no_grad()
def test_many_windows_read_as_without_a_cache(rings: Tiny, sink: int, recent: int) -> None:
    model = rings.attach(ranks=rings.ragged(1), sink=sink, recent=recent)
    ids = tokens(2, 150)
    expected = model(ids, use_cache=False).logits
    for steps in ((), (90, 1, 1, 12, 30), (5, 4)):
        found = stepwise(model, ids, steps)
        assert largest_difference(found, expected) < room(rings, 2e-5)


@EXACT
@torch.no_grad()
def test_a_padded_batch_of_many_windows(rings: Tiny, sink: int, recent: int) -> None:
    """Sequences start within a window of one another, and windows apart."""
    model = rings.attach(ranks=rings.ragged(2), sink=sink, recent=recent)
    prompts = [tokens(1, length, seed=length) for length in (60, 55, 21, 4)]
    ids, mask = left_padded(prompts)
    for steps in ((58,), (30, 8, 20), (1,)):
        batch = stepwise(model, ids, steps, mask_BT=mask)
        for row, prompt in enumerate(prompts):
            alone = model(prompt, use_cache=False).logits
            found = batch[row : row + 1, -prompt.shape[1] :]
            assert largest_difference(found, alone) < room(rings, 2e-5)


def test_bytes_stop_growing_with_the_window(rings: Tiny) -> None:
    model = rings.attach(ranks=rings.ragged(1), sink=2, recent=3)
    cache: Any = matkv.LatentCache(model)
    held = []
    for piece in (400, *[1] * 100):
        feed(model, cache, tokens(1, piece))
        held.append(sum(layer.used_nbytes for layer in sliding(cache)))
        rows = [buffer.shape[2] for layer in sliding(cache) for buffer in layer.buffers]
        assert max(rows) <= 2 * 64  # a grain of rows, and as many to move into
    assert len(set(held)) == 1
    states = [layer._tensors() for layer in sliding(cache)]
    assert sum(one.nbytes for layer in states for one in layer) < 3 * 64 * held[0]


@EXACT
@torch.no_grad()
def test_a_recorded_past_can_be_taken_back(rings: Tiny, sink: int, recent: int) -> None:
    model = rings.attach(ranks=rings.ragged(3), sink=sink, recent=recent)
    ids = tokens(2, 70)
    cache: Any = matkv.LatentCache(model)
    feed(model, cache, ids[:, :30])
    cache.activate_past_recording()
    end = 30
    for more, back in ((15, 15), (4, 1), (20, 12), (1, 0), (9, 9), (3, 2)):
        feed(model, cache, ids[:, end : end + more])
        cache.crop(-back)
        end += more - back
    assert cache.get_seq_length() == end
    expected = model(ids[:, : end + 5], use_cache=False).logits[:, end:]
    found = feed(model, copy.deepcopy(cache), ids[:, end : end + 5])
    assert largest_difference(found, expected) < room(rings, 2e-5)
    # What was kept to be taken back is given back with the crop.
    assert {layer.gone for layer in sliding(cache)} == {end - WINDOW + 1}


def test_a_past_that_is_gone_cannot_be_taken_back(rings: Tiny) -> None:
    model = rings.attach(ranks=rings.ragged(3), sink=2, recent=0)
    ids = tokens(1, 40)
    cache: Any = matkv.LatentCache(model)
    feed(model, cache, ids[:, :7])
    cache.crop(-3)  # within the window nothing has gone
    feed(model, cache, ids[:, 4:20])
    before = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(CacheError, match=r"sliding window of 9.*activate_past_recording"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == before
    cache.crop(0)
    cache.reset()
    assert torch.equal(feed(model, cache, ids), feed(model, matkv.LatentCache(model), ids))


@pytest.mark.parametrize("make", [DynamicCache, lambda **_: DynamicCache()])
def test_caches_of_transformers_turn_latent(rings: Tiny, make: Any) -> None:
    model = rings.attach(ranks=rings.ragged(1), recent=2)
    ids, cache = tokens(1, 25), make(config=model.config)
    found = feed(model, cache, ids)
    assert type(cache) is matkv.LatentCache and len(sliding(cache)) == 2
    assert torch.equal(found, feed(model, matkv.LatentCache(model), ids))
    assert cache.is_sliding == [False, True, False, True]


@EXACT
def test_static_caches_give_the_same(rings: Tiny, sink: int, recent: int) -> None:
    model = rings.attach(ranks=rings.ragged(1), sink=sink, recent=recent)
    ids = tokens(2, 60)
    expected = stepwise(model, ids, (25, 3))
    for cache in (
        StaticLatentCache(model, 64),
        StaticCache(config=model.config, max_cache_len=64),
    ):
        out = stepwise(model, ids, (25, 3), cache)
        assert largest_difference(out, expected) < room(rings, 2e-5)
        kinds = [type(layer) is SlidingStaticLatentLayer for layer in cache.layers]
        assert kinds == [False, True, False, True]
    plain = greedy(model, ids[:1, :30], 20)
    assert torch.equal(greedy(model, ids[:1, :30], 20, cache_implementation="static"), plain)


def test_states_that_a_window_has_passed_do_not_fill_a_ring(rings: Tiny) -> None:
    ids = tokens(1, 20)
    long, short = (DynamicCache(config=rings.model.config) for _ in range(2))
    feed(rings.model, long, ids)
    feed(rings.model, short, ids[:, :8])
    model = rings.attach(ranks=rings.ragged(1))
    with pytest.raises(CacheError, match="holds 8 of 20 tokens"):
        refill(model, long)
    refilled: Any = refill(model, short)
    assert [layer.get_seq_length() for layer in refilled.layers] == [8] * 4


def test_a_whole_window_is_refilled_with_its_length(gemma3: Tiny) -> None:
    ids = tokens(1, 20)
    states = DynamicCache(config=gemma3.model.config)
    with torch.no_grad():
        gemma3.model(ids[:, :17], past_key_values=states)
        expected = gemma3.model(ids, use_cache=False).logits[:, 17:]
        again = gemma3.model(ids[:, 17:], past_key_values=refill(gemma3.model, states)).logits
    assert largest_difference(again, expected) < 1e-5


def test_layers_that_were_calibrated_whole_stay_so(rings: Tiny) -> None:
    """Artifacts of before there were rings."""
    artifact = rings.artifact
    whole = artifact.geometry.without_rings()
    bases = {layer: artifact.bases[layer] for layer in whole.compressed}
    older = replace(artifact, geometry=whole, bases=bases, tables={})
    model = matkv.attach(rings.model, older, 0.5)
    cache: Any = matkv.LatentCache(model)
    feed(model, cache, tokens(1, 20))
    assert [type(layer) for layer in cache.layers[1::2]] == [DynamicSlidingWindowLayer] * 2
    assert cache.used_nbytes == older.table(0.5).nbytes(20, torch.float32)
