"""The latent cache: its bytes, its growth, and what generation does to it besides appending."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import matkv
from coded import coded
from matkv.cache.cache import LatentCache, StaticLatentCache, new_cache
from matkv.errors import CacheError
from matkv.latents.layer import LayerProjection
from matkv.ranks import RankTable
from tiny import Tiny, largest_difference, latent_layers, stepwise, tiny, tokens

EXACT = pytest.mark.parametrize(("sink", "recent"), [(0, 0), (3, 0), (0, 5), (3, 5)])


def filled(subject: Tiny, ids: Tensor, **options: Any) -> matkv.LatentCache:
    """A cache that holds `ids`, prefilled in one go."""
    cache = matkv.LatentCache(subject.model, **options)
    feed(subject, cache, ids)
    return cache


@torch.no_grad()
def feed(subject: Tiny, cache: Any, ids: Tensor) -> Tensor:
    logits: Tensor = subject.model(ids, past_key_values=cache).logits
    return logits


def tensors_of(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor of numbers or codes that `thing` leads to, except by way of the model."""
    if id(thing) in seen or isinstance(thing, (LayerProjection, str, type)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if thing.is_floating_point() or thing.dtype == torch.uint8:
            yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_of(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from tensors_of(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from tensors_of(vars(thing), seen)


def held_bytes(cache: Any) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors_of(cache, set())
    }
    return sum(storages.values())


def same_next_logits(subject: Tiny, one: Any, other: Any, batch: int) -> bool:
    ids = tokens(batch, 3, seed=99)
    return largest_difference(feed(subject, one, ids), feed(subject, other, ids)) < 1e-5


# ---- bytes


@EXACT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma3_rings"])
@pytest.mark.parametrize("kind", [tiny, coded])
def test_bytes_are_those_the_rank_table_promises(
    kind: Callable[[str], Tiny], name: str, dtype: torch.dtype, sink: int, recent: int
) -> None:
    shared = kind(name)
    subject = replace(shared, model=copy.deepcopy(shared.model).to(dtype))
    table = subject.ragged(1)
    subject.attach(ranks=table, sink=sink, recent=recent)
    cache = matkv.LatentCache(subject.model)
    assert cache.nbytes == cache.used_nbytes == 0
    length = 0
    for piece in (1, 1, 6, 1, 70, 1, 1):
        feed(subject, cache, tokens(2, piece))
        length += piece
        promised = table.nbytes(length, dtype, batch=2, sink=sink, recent=recent)
        assert cache.used_nbytes == promised
        assert cache.nbytes == held_bytes(cache) >= promised


def test_spare_room_stays_under_a_quarter(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1))
    cache = filled(llama, tokens(1, 130))
    for _ in range(200):
        feed(llama, cache, tokens(1, 1))
        assert cache.nbytes <= 1.25 * cache.used_nbytes + 64 * cache.used_nbytes / 130


def test_an_empty_bucket_holds_no_bytes(llama: Tiny) -> None:
    zero = tuple((0, 0) for _ in llama.geometry.layers)
    llama.attach(ranks=RankTable(llama.geometry, zero, zero))
    cache = filled(llama, tokens(2, 10))
    assert cache.nbytes == cache.used_nbytes == 0
    assert cache.get_seq_length() == 10


# ---- growth


def test_appending_a_token_does_not_move_the_others(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1), sink=2)
    cache = filled(llama, tokens(1, 65))
    capacity = latent_layers(cache)[0].buffers[0].shape[2]

    def places() -> list[int]:
        return [b.data_ptr() for layer in latent_layers(cache) for b in layer.buffers]

    before = places()
    for _ in range(capacity + 2 - 65):  # the two sinks have no latents
        feed(llama, cache, tokens(1, 1))
    assert places() == before
    feed(llama, cache, tokens(1, 1))
    assert places() != before


def test_growth_is_geometric(llama: Tiny) -> None:
    llama.attach(budget=0.5)
    layer = latent_layers(matkv.LatentCache(llama.model))[0]
    key_BGTD = torch.randn(1, 2, 1, 16)
    moves, place = 0, 0
    for _ in range(5000):
        layer.update(key_BGTD, key_BGTD)
        moves += layer.buffers[0].data_ptr() != place
        place = layer.buffers[0].data_ptr()
    assert moves <= 24  # 64 * 1.25**n > 5000 at n = 20, and the first steps are of 64 tokens


def test_reserved_room_is_there_from_the_first_token(llama: Tiny) -> None:
    llama.attach(budget=0.5)
    cache = filled(llama, tokens(1, 5), max_cache_len=300)
    before, nbytes = latent_layers(cache)[0].buffers[0].data_ptr(), cache.nbytes
    assert latent_layers(cache)[0].buffers[0].shape[2] >= 300
    for _ in range(3):
        feed(llama, cache, tokens(1, 98))
    assert latent_layers(cache)[0].buffers[0].data_ptr() == before
    assert cache.nbytes == nbytes


def test_tokens_added_in_inference_mode_can_be_extended_outside(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1), sink=2, recent=3)
    ids = tokens(1, 20)
    cache = matkv.LatentCache(llama.model)
    with torch.inference_mode():
        llama.model(ids[:, :9], past_key_values=cache)
    rest = stepwise(llama.model, ids[:, 9:], (4,), cache)
    with torch.no_grad():
        whole = llama.model(ids).logits
    assert largest_difference(rest, whole[:, 9:]) < 1e-5


def test_gradients_reach_a_learned_prefix_through_plain_tokens(ranked_llama: Tiny) -> None:
    """In the first layer only the prefix has gradients: later tokens must not write over it."""
    llama = ranked_llama
    model = llama.attach(ranks=llama.ragged(1))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        embed = model.get_input_embeddings()
        prefix = embed(tokens(1, 6)).clone().requires_grad_()
        rest = embed(tokens(1, 9, seed=1))

        def gradient(*pieces: Tensor) -> Tensor:
            cache = matkv.LatentCache(model)
            outs = [model(inputs_embeds=p, past_key_values=cache).logits for p in pieces]
            found: Tensor = torch.autograd.grad(outs[-1][:, -1].square().sum(), prefix)[0]
            return found

        whole = gradient(torch.cat((prefix, rest), 1))
        in_pieces = gradient(prefix, *rest.split(3, 1))
        assert largest_difference(in_pieces, whole) < 1e-4 * float(whole.abs().max())
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


# ---- what generation does


@EXACT
def test_crop_leaves_what_was_there_before(gemma3: Tiny, sink: int, recent: int) -> None:
    gemma3.attach(ranks=gemma3.ragged(1), sink=sink, recent=recent)
    ids = tokens(2, 20)
    cache: Any = matkv.LatentCache(gemma3.model)
    cache.activate_past_recording()
    feed(gemma3, cache, ids[:, :15])
    cache.crop(0)
    feed(gemma3, cache, ids[:, 15:])
    cache.crop(-4)
    assert cache.get_seq_length() == 16
    assert same_next_logits(gemma3, cache, filled(gemma3, ids[:, :16]), 2)


@torch.no_grad()
def test_crop_takes_a_number_in_a_tensor(llama: Tiny) -> None:
    """As assisted decoding counts before transformers 5.23; layers must not share the tensor."""
    ids = tokens(1, 12)
    model = llama.attach(ranks=llama.ragged(), recent=3)
    expected = stepwise(model, ids, (8,))
    cache: Any = matkv.LatentCache(model)
    cache.activate_past_recording()
    model(ids[:, :6], past_key_values=cache)
    for _ in range(2):
        removed: Any = torch.tensor(-2)
        for layer in cache.layers:
            layer.crop(removed)
        assert {type(layer.get_seq_length()) for layer in cache.layers} == {int}
        model(ids[:, 4:6], past_key_values=cache)
    rest = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[:, 6:], rtol=0, atol=1e-5)


def test_crop_to_nothing_starts_over(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1), sink=2, recent=3)
    cache = filled(llama, tokens(2, 2))
    cache.crop(-5)
    assert cache.get_seq_length() == 0
    assert same_next_logits(llama, cache, matkv.LatentCache(llama.model), 2)


def test_crop_within_the_sinks(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1), sink=6)
    ids = tokens(2, 9)
    cache = filled(llama, ids)
    cache.crop(-6)
    assert same_next_logits(llama, cache, filled(llama, ids[:, :3]), 2)


def test_a_crop_that_lost_its_past_is_refused_and_changes_nothing(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1), recent=5)
    ids = tokens(1, 20)
    cache = filled(llama, ids)
    with pytest.raises(CacheError, match="call activate_past_recording"):
        cache.crop(-3)
    assert cache.get_seq_length() == 20
    assert same_next_logits(llama, cache, filled(llama, ids), 1)


def test_crop_by_a_positive_number_is_refused(llama: Tiny) -> None:
    llama.attach()
    with pytest.raises(CacheError, match=r"crop\(3\): pass the negative number"):
        filled(llama, tokens(1, 5)).crop(3)


SELECTIONS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select-mask": (
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        [0, 2],
    ),
}


@EXACT
@pytest.mark.parametrize("name", SELECTIONS)
def test_selecting_sequences_is_like_having_fed_those(
    gemma3: Tiny, name: str, sink: int, recent: int
) -> None:
    gemma3.attach(ranks=gemma3.ragged(1), sink=sink, recent=recent)
    act, rows = SELECTIONS[name]
    ids = tokens(3, 14)
    cache = filled(gemma3, ids)
    act(cache)
    assert same_next_logits(gemma3, cache, filled(gemma3, ids[rows]), len(rows))


def test_selecting_in_an_empty_cache_does_nothing(llama: Tiny) -> None:
    llama.attach()
    for act, _ in SELECTIONS.values():
        cache = matkv.LatentCache(llama.model)
        act(cache)
        assert cache.get_seq_length() == cache.nbytes == 0


@EXACT
@pytest.mark.parametrize("batch", [2, 3])
def test_a_cache_can_be_reset_and_reused(gemma3: Tiny, batch: int, sink: int, recent: int) -> None:
    gemma3.attach(ranks=gemma3.ragged(1), sink=sink, recent=recent)
    cache = filled(gemma3, tokens(2, 20))
    before = [b.data_ptr() for layer in latent_layers(cache) for b in layer.buffers if b.numel()]
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(batch, 11, seed=3)
    feed(gemma3, cache, ids)
    after = [b.data_ptr() for layer in latent_layers(cache) for b in layer.buffers if b.numel()]
    assert (after == before) == (batch == 2)  # the room of a batch of the same size is used again
    assert same_next_logits(gemma3, cache, filled(gemma3, ids), batch)


def test_reset_stops_recording_the_past(llama: Tiny) -> None:
    table = llama.ragged(1)
    llama.attach(ranks=table, recent=4)
    cache: Any = matkv.LatentCache(llama.model)
    cache.activate_past_recording()
    feed(llama, cache, tokens(1, 9))
    cache.reset()
    feed(llama, cache, tokens(1, 9))
    assert cache.used_nbytes == table.nbytes(9, torch.float32, recent=4)


def test_another_batch_size_is_refused_without_reset(llama: Tiny) -> None:
    llama.attach(budget=0.5)
    cache = filled(llama, tokens(2, 4))
    with pytest.raises(CacheError, match="holds 2 sequences, 3 were given"):
        feed(llama, cache, tokens(3, 1))


@EXACT
def test_a_copy_shares_the_projection_and_not_the_tokens(
    gemma3: Tiny, sink: int, recent: int
) -> None:
    gemma3.attach(ranks=gemma3.ragged(1), sink=sink, recent=recent)
    ids = tokens(2, 12)
    cache = filled(gemma3, ids)
    twin = copy.deepcopy(cache)
    assert twin.nbytes == cache.nbytes
    for one, other in zip(latent_layers(cache), latent_layers(twin), strict=True):
        assert one.projection is other.projection
        mine = {t.data_ptr() for t in one._tensors() if t.numel()}
        assert mine.isdisjoint(t.data_ptr() for t in other._tensors() if t.numel())
    feed(gemma3, twin, tokens(2, 5, seed=8))
    assert cache.get_seq_length() == 12
    assert same_next_logits(gemma3, cache, filled(gemma3, ids), 2)


def test_layers_can_be_offloaded_and_brought_back(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1), sink=2, recent=3)
    ids = tokens(2, 12)
    cache = filled(llama, ids)
    for layer in latent_layers(cache):
        layer.device = torch.device("meta")  # stands for a GPU
        layer.offload()
        assert {t.device.type for t in layer._tensors()} == {"cpu"}
        layer.device = torch.device("cpu")
        layer.prefetch()
    assert same_next_logits(llama, cache, filled(llama, ids), 2)
    for layer in latent_layers(cache):
        layer.device = torch.device("meta")
        layer.prefetch()
        assert {t.device.type for t in layer._tensors()} == {"meta"}


def test_offloading_an_empty_layer_does_nothing(llama: Tiny) -> None:
    llama.attach()
    for layer in latent_layers(matkv.LatentCache(llama.model)):
        layer.offload()
        layer.prefetch()
        assert layer._tensors() == []


def test_a_cache_needs_an_attached_model(llama: Tiny) -> None:
    with pytest.raises(CacheError, match="call matkv"):
        matkv.LatentCache(llama.model)


def test_new_cache_follows_the_model(llama: Tiny) -> None:
    assert type(new_cache(llama.model)) is DynamicCache
    llama.attach()
    assert type(new_cache(llama.model)) is matkv.LatentCache


# ---- what is refused, and what it leaves


@pytest.mark.parametrize("recent", [0, 5])
@pytest.mark.parametrize(
    "kind", [matkv.LatentCache, lambda model: DynamicCache(config=model.config)]
)
def test_a_refused_crop_changes_no_layer(gemma3: Tiny, kind: Any, recent: int) -> None:
    gemma3.attach(ranks=gemma3.ragged(1), recent=recent)
    ids, cache = tokens(1, 20), kind(gemma3.model)
    for length in (6, 20):  # sliding layers are beyond their window only in the end
        feed(gemma3, cache, ids[:, cache.get_seq_length() : length])
        if recent == 0 and length == 6:
            continue
        with pytest.raises(CacheError, match="activate_past_recording"):
            cache.crop(-3)
        assert {layer.get_seq_length() for layer in cache.layers} == {length}
        twin = filled(gemma3, ids[:, :length])
        assert same_next_logits(gemma3, copy.deepcopy(cache), twin, 1)


def test_a_crop_by_more_than_there_is_starts_over(gemma3: Tiny) -> None:
    gemma3.attach(ranks=gemma3.ragged(1), sink=2, recent=3)
    cache: Any = matkv.LatentCache(gemma3.model)
    cache.activate_past_recording()
    feed(gemma3, cache, tokens(1, 20))
    cache.crop(-30)
    assert {layer.get_seq_length() for layer in cache.layers} == {0}
    assert same_next_logits(gemma3, cache, matkv.LatentCache(gemma3.model), 1)


@pytest.mark.parametrize("lazy", [False, True])
def test_latents_are_no_keys_and_values(gemma3: Tiny, lazy: bool) -> None:
    gemma3.attach(budget=0.5)
    cache: Any = DynamicCache() if lazy else matkv.LatentCache(gemma3.model)
    feed(gemma3, cache, tokens(1, 10))
    for read in (
        lambda: cache.layers[1].keys.shape,
        lambda: cache.layers[1].values,
        lambda: DynamicCache(list(cache)),
    ):
        with pytest.raises(CacheError, match="no keys and values at full width"):
            read()
    cache.reset()
    assert cache.layers[1].keys is cache.layers[1].values is None
    assert not any(layer.is_initialized for layer in cache.layers)
    assert DynamicCache(list(cache)).get_seq_length() == 0


def test_a_slip_is_no_matter_of_caches(llama: Tiny) -> None:
    llama.attach(budget=0.5)
    layer = latent_layers(matkv.LatentCache(llama.model))[0]
    latents = layer.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))[0]
    with pytest.raises(CacheError, match="not attached"):
        latents.transpose(1, 2)
    with pytest.raises(AttributeError, match="no attribute 'toknes'"):
        latents.toknes  # noqa: B018


@pytest.mark.parametrize("model", [None, "smollm2-135m", torch.nn.Linear(2, 2)])
@pytest.mark.parametrize("make", [LatentCache, lambda model: StaticLatentCache(model, 8)])
def test_what_is_no_model_has_no_cache(make: Any, model: Any) -> None:
    with pytest.raises(CacheError, match="made for a model of transformers, not for"):
        make(model)


def test_a_cache_is_made_for_the_model_in_a_wrapper(llama: Tiny) -> None:
    llama.attach(ranks=llama.ragged(1))
    cache = LatentCache(torch.nn.Sequential(llama.model))
    assert len(cache.layers) == llama.model.config.num_hidden_layers


def test_to_crop_nothing_is_never_refused(gemma3: Tiny) -> None:
    gemma3.attach(ranks=gemma3.ragged(1), recent=3)
    ids, cache = tokens(1, 20), matkv.LatentCache(gemma3.model)
    cache.crop(0)
    cache.crop(-3)  # nothing to take back
    feed(gemma3, cache, ids)
    cache.crop(0)
    assert same_next_logits(gemma3, cache, filled(gemma3, ids), 1)
    recording = matkv.LatentCache(gemma3.model)
    recording.activate_past_recording()  # type: ignore[no-untyped-call]
    feed(gemma3, recording, ids)
    held = recording.used_nbytes
    recording.crop(0)
    assert recording.used_nbytes == filled(gemma3, ids).used_nbytes < held
