"""The static cache: the same results in tensors that never change shape, and one compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import matkv
from matkv.cache.static import StaticLatentCache, StaticLatentLayer
from matkv.errors import CacheError
from tiny import Tiny, greedy, largest_difference, left_padded, stepwise, tokens

ROOM = 32


def test_logits_are_those_of_a_growing_cache(family: Tiny) -> None:
    family.attach(ranks=family.ragged(1))
    ids = tokens(2, 20)
    expected = stepwise(family.model, ids, (9, 3))
    out = stepwise(family.model, ids, (9, 3), StaticLatentCache(family.model, ROOM))
    assert largest_difference(out, expected) < 2e-5


def test_padded_batches_generate_the_same_tokens(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1))
    ids, mask = left_padded([tokens(1, 12), tokens(1, 5, seed=1)])
    expected = greedy(llama.model, ids, attention_mask=mask)
    cache = StaticLatentCache(llama.model, ROOM)
    out = greedy(llama.model, ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(out, expected)


def test_beams_are_reordered(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1))
    ids = tokens(1, 6)
    expected = greedy(llama.model, ids, num_beams=3)
    cache = StaticLatentCache(llama.model, ROOM)
    assert torch.equal(greedy(llama.model, ids, num_beams=3, past_key_values=cache), expected)


def test_buffers_stay_where_they_are_and_hold_the_promised_bytes(llama: Tiny) -> None:
    table = llama.ragged(1)
    llama.attach(ranks=table)
    cache: Any = StaticLatentCache(llama.model, ROOM)
    stepwise(llama.model, tokens(1, 6), (5,), cache)
    before = addresses(cache)
    assert cache.nbytes == table.nbytes(ROOM, torch.float32)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    ids = tokens(1, 11, seed=1)
    out = stepwise(llama.model, ids, (4,), cache)
    assert addresses(cache) == before
    assert largest_difference(out, stepwise(llama.model, ids, (4,))) < 2e-5


def addresses(cache: Any) -> list[int]:
    return [b.data_ptr() for layer in cache.layers for b in layer.buffers]


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_a_decoding_step_compiles_to_one_graph(llama: Tiny) -> None:
    model = llama.attach(ranks=llama.ragged(1))
    ids = tokens(1, 12)
    expected = stepwise(model, ids, (8,))
    graphs = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    step: Any = torch.compile(model, backend=backend, fullgraph=True)
    cache = StaticLatentCache(model, ROOM)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        for place in range(8, 12):
            out = step(ids[:, place : place + 1], past_key_values=cache).logits
            assert largest_difference(out[:, -1], expected[:, place]) < 2e-5
    assert len(graphs) == 1


def test_exact_tokens_and_offloading_are_refused(llama: Tiny) -> None:
    llama.attach(budget=0.5, sink=2)
    with pytest.raises(CacheError, match="keeps no exact tokens"):
        StaticLatentCache(llama.model, ROOM)
    llama.attach(budget=0.5)
    layer = StaticLatentCache(llama.model, ROOM).layers[0]
    assert isinstance(layer, StaticLatentLayer)
    with pytest.raises(CacheError, match="stays on its device"):
        layer.offload()
    matkv.detach(llama.model)
    with pytest.raises(CacheError, match="has no bases"):
        StaticLatentCache(llama.model, ROOM)


def test_crop_forgets_the_last_tokens(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1))
    ids = tokens(2, 20)
    cache: Any = StaticLatentCache(llama.model, ROOM)
    assert cache.batch_size == -1
    stepwise(llama.model, ids, (9, 3), cache)
    cache.crop(-8)
    assert (int(cache.get_seq_length()), cache.batch_size) == (12, 2)
    out = stepwise(llama.model, ids[:, 12:], (4,), cache)
    assert largest_difference(out, stepwise(llama.model, ids, (9, 3))[:, 12:]) < 2e-5
    cache.crop(-ROOM)
    assert int(cache.get_seq_length()) == 0
    with pytest.raises(CacheError, match=r"crop\(3\)"):
        cache.crop(3)
    with pytest.raises(CacheError, match="no keys and values"):
        cache.layers[0].keys.shape  # noqa: B018


def test_crop_with_a_sliding_window_is_refused(gemma3: Tiny) -> None:
    gemma3.attach(budget=0.5)
    cache: Any = StaticLatentCache(gemma3.model, ROOM)
    stepwise(gemma3.model, tokens(1, 12), (9,), cache)
    with pytest.raises(CacheError, match="sliding window cannot be cropped"):
        cache.crop(-1)
    assert {int(layer.get_seq_length()) for layer in cache.layers} >= {12}


def test_a_wider_dtype_than_the_buffers_is_refused(llama: Tiny) -> None:
    llama.attach(budget=0.5)
    layer: Any = StaticLatentCache(llama.model, ROOM).layers[0]
    layer.projection.to(torch.bfloat16)
    states = torch.randn(1, 2, 3, 16).bfloat16()
    layer.update(states, states)
    layer.projection.to(torch.float32)
    with pytest.raises(CacheError, match=r"cannot take torch\.float32"):
        layer.update(states.float(), states.float())
