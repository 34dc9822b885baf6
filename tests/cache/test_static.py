"""The static cache: the same results in tensors that never change shape, and one compiled graph."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CompileConfig

import matkv
from coded import Coded
from matkv.cache.cache import StaticLatentCache
from matkv.cache.static import StaticLatentLayer
from matkv.errors import CacheError
from tiny import Tiny, greedy, largest_difference, left_padded, stepwise, tokens

ROOM = 32
EXACT = pytest.mark.parametrize(("sink", "recent"), [(0, 0), (3, 0), (0, 4), (3, 4)])
PROMPTS = [tokens(1, length, seed=length) for length in (12, 2, 5)]


@EXACT
@pytest.mark.parametrize("steps", [(9, 3), (1, 2, 6, 1, 8), (20,)])
def test_logits_are_those_of_a_growing_cache(
    llama: Tiny, sink: int, recent: int, steps: tuple[int, ...]
) -> None:
    llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent)
    ids = tokens(2, 20)
    expected = stepwise(llama.model, ids, steps)
    out = stepwise(llama.model, ids, steps, StaticLatentCache(llama.model, ROOM))
    assert largest_difference(out, expected) < 2e-5


def test_every_family_has_static_caches(family: Tiny) -> None:
    family.attach(ranks=family.ragged(1), sink=2, recent=3)
    ids = tokens(2, 20)
    expected = stepwise(family.model, ids, (9, 3))
    out = stepwise(family.model, ids, (9, 3), StaticLatentCache(family.model, ROOM))
    assert largest_difference(out, expected) < 2e-5


@pytest.mark.parametrize("room", (12, 13, 14, 18))
def test_room_that_exact_tokens_fill_more_or_less(llama: Tiny, room: int) -> None:
    """From no row at all to more rows than tokens."""
    llama.attach(ranks=llama.ragged(1), sink=4, recent=9)
    ids = tokens(2, 12)
    for steps in ((12,), (5, 4), (), (2, 8)):
        expected = stepwise(llama.model, ids, steps)
        out = stepwise(llama.model, ids, steps, StaticLatentCache(llama.model, room))
        assert largest_difference(out, expected) < 2e-5


@EXACT
@pytest.mark.parametrize("steps", [(12,), (7, 5), (11, 1)])
def test_padded_batches_in_pieces(
    llama: Tiny, sink: int, recent: int, steps: tuple[int, ...]
) -> None:
    """Some sequences start in the second piece, or with the last token of one."""
    llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent)
    ids_BT, mask_BT = left_padded(PROMPTS)
    ids_BT = torch.cat((ids_BT, tokens(3, 8, seed=9)), dim=1)
    mask_BT = torch.cat((mask_BT, torch.ones(3, 8, dtype=torch.long)), dim=1)
    cache = StaticLatentCache(llama.model, ROOM)
    out = stepwise(llama.model, ids_BT, steps, cache, mask_BT)
    expected = stepwise(llama.model, ids_BT, steps, mask_BT=mask_BT)
    seen_BT = mask_BT.bool()
    assert largest_difference(out[seen_BT], expected[seen_BT]) < 2e-5


@EXACT
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
@pytest.mark.parametrize("way", ["cache", "cache_implementation"])
def test_padded_batches_generate_the_same_tokens(
    llama: Tiny, sink: int, recent: int, options: dict[str, Any], way: str
) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent)
    ids, mask = left_padded(PROMPTS)
    expected = greedy(model, ids, attention_mask=mask, **options)
    how: dict[str, Any] = {"cache_implementation": "static"}
    if way == "cache":
        how = {"past_key_values": StaticLatentCache(model, ROOM)}
    how |= {"attention_mask": mask, "return_dict_in_generate": True}
    out: Any = greedy(model, ids, **options, **how)
    assert type(out.past_key_values) is StaticLatentCache
    assert torch.equal(out.sequences, expected)


@torch.no_grad()
def test_reordered_sequences_take_their_padding_along(llama: Tiny) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=3, recent=4)
    ids_BT, mask_BT = left_padded(PROMPTS)
    order, more = torch.tensor([2, 0, 0]), tokens(3, 6, seed=9)
    logits = []
    caches: list[Any] = [matkv.LatentCache(model), StaticLatentCache(model, ROOM)]
    for cache in caches:
        stepwise(model, ids_BT, (12,), cache, mask_BT)
        cache.reorder_cache(order)
        seen_BT = torch.cat((mask_BT[order], torch.ones_like(more)), dim=1)
        positions_BT = seen_BT.cumsum(-1) - 1
        for place in range(6):
            step = {"past_key_values": cache, "attention_mask": seen_BT[:, : 13 + place]}
            step["position_ids"] = positions_BT[:, 12 + place, None]
            logits.append(model(more[:, place, None], **step).logits)
    for mine, theirs in zip(logits[6:], logits[:6], strict=True):
        assert largest_difference(mine, theirs) < 2e-5


@EXACT
@pytest.mark.parametrize("rollback", [0, 3])
def test_buffers_stay_where_they_are_and_hold_the_promised_bytes(
    llama: Tiny, sink: int, recent: int, rollback: int
) -> None:
    table = llama.ragged(1)
    llama.attach(ranks=table, sink=sink, recent=recent)
    cache: Any = StaticLatentCache(llama.model, ROOM, rollback=rollback)
    ids_BT, mask_BT = left_padded(PROMPTS)
    stepwise(llama.model, ids_BT, (5,), cache, mask_BT)
    before = addresses(cache)
    spare = 3 * rollback * table.geometry.columns * 4 if recent else 0
    promised = table.nbytes(ROOM, torch.float32, batch=3, sink=sink, recent=recent)
    assert cache.nbytes == promised + spare
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    ids = tokens(3, 11, seed=1)
    out = stepwise(llama.model, ids, (4,), cache)
    assert addresses(cache) == before
    assert largest_difference(out, stepwise(llama.model, ids, (4,))) < 2e-5


def addresses(cache: Any) -> list[int]:
    return [b.data_ptr() for layer in cache.layers for b in layer._tensors()]


def test_no_room_and_padding_among_tokens_are_refused(llama: Tiny) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=2, recent=3)
    cache: Any = StaticLatentCache(model, 8)
    for pieces in ((8, 1), (5, 4)):
        cache.reset()
        with pytest.raises(CacheError, match=r"with room for 8 tokens holds [58], and [14] more"):
            stepwise(model, tokens(1, sum(pieces)), pieces, cache)
    for mask in ([1, 1, 0, 1], [0, 1, 1, 0]):
        cache.reset()
        given = {"attention_mask": torch.tensor([mask]), "past_key_values": cache}
        with pytest.raises(CacheError, match="takes padding on the left alone"):
            model(tokens(1, 4), **given)
    for numbers in ((0, 0), (4, -1)):
        with pytest.raises(CacheError, match="must be numbers of tokens"):
            StaticLatentCache(model, numbers[0], rollback=numbers[1])


# ---- compiled


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize(("sink", "recent", "padded"), [(0, 4, False), (3, 4, True)])
@torch.no_grad()
def test_pieces_and_decoding_steps_compile_to_a_graph_each(
    llama: Tiny, sink: int, recent: int, padded: bool
) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent)
    ids_BT, mask_BT = left_padded(PROMPTS)
    ids_BT = torch.cat((ids_BT, tokens(3, 8, seed=9)), dim=1)
    mask_BT = torch.cat((mask_BT, torch.ones(3, 8, dtype=torch.long)), dim=1)
    mask_BT = mask_BT if padded else torch.ones_like(mask_BT)
    expected = stepwise(model, ids_BT, (4, 4, 4), mask_BT=mask_BT)
    graphs = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    step: Any = torch.compile(model, backend=backend, fullgraph=True)
    cache: Any = StaticLatentCache(model, ROOM)
    cache.early_initialization(3, 2, 16, torch.float32, torch.device("cpu"))
    seen_BT = F.pad(mask_BT, (0, ROOM - mask_BT.shape[1]))
    slot_T, first = torch.arange(ROOM), 0
    for size in (4, 4, 4, *[1] * 8):
        place = slot_T[first : first + size]
        sees = (slot_T <= place[:, None]) & seen_BT[:, None, None].bool()
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, first : first + size]
        inputs = {"attention_mask": sees, "position_ids": positions_BT.contiguous()}
        piece_BT = ids_BT[:, first : first + size].contiguous()
        out = step(piece_BT, past_key_values=cache, **inputs).logits
        real_BT = mask_BT[:, first : first + size].bool()
        at = slice(first, first + size)
        assert largest_difference(out[real_BT], expected[:, at][real_BT]) < 2e-5
        first += size
    assert len(graphs) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125])
@torch.no_grad()
def test_64_greedy_tokens_of_three_caches(llama: Tiny, budget: float) -> None:
    """Growing, static, and static by the step that `generate` compiles."""
    own: Any = copy.deepcopy(llama.model)  # generate leaves its compiled step on a model
    is_coded = isinstance(llama, Coded)
    ranks = llama.ragged(round(8 * budget)) if is_coded else llama.artifact.table(budget)
    model = replace(llama, model=own).attach(ranks=ranks, sink=4, recent=8)
    ids, mask = left_padded(PROMPTS)
    expected = greedy(model, ids, 64, attention_mask=mask)
    how = {"attention_mask": mask, "cache_implementation": "static"}
    assert torch.equal(greedy(model, ids, 64, **how), expected)
    if is_coded and budget != 0.25:  # tracing codes takes long
        return
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = greedy(model, ids, 64, compile_config=traced(), **how)
    assert torch.equal(out, expected)


def traced() -> CompileConfig:
    """One graph, on a CPU too, run as it was traced."""
    compiled: Any = CompileConfig(backend="eager", fullgraph=True)
    compiled.mode, compiled._compile_all_devices = None, True
    return cast(CompileConfig, compiled)


def test_offloading_is_refused(llama: Tiny) -> None:
    llama.attach(budget=0.5)
    layer = StaticLatentCache(llama.model, ROOM).layers[0]
    assert isinstance(layer, StaticLatentLayer)
    with pytest.raises(CacheError, match="stays on its device"):
        layer.offload()
    matkv.detach(llama.model)
    with pytest.raises(CacheError, match="has no bases"):
        StaticLatentCache(llama.model, ROOM)


@pytest.mark.parametrize(("sink", "recent"), [(3, 0), (0, 4), (3, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_crop_back_into_the_ring(llama: Tiny, sink: int, recent: int, padded: bool) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent)
    ids_BT, mask_BT = left_padded([tokens(1, 20, seed=2), tokens(1, 20 - 9 * padded, seed=3)])
    cache: Any = StaticLatentCache(model, ROOM, rollback=6)
    assert cache.is_croppable
    expected = stepwise(model, ids_BT, (9, 3), mask_BT=mask_BT)[:, 14:]
    stepwise(model, ids_BT, (9, 3), cache, mask_BT)
    for removed in (2, 4):  # six in two steps
        cache.crop(-removed)
    assert int(cache.get_seq_length()) == 14
    inputs = {"attention_mask": mask_BT, "past_key_values": cache}
    inputs["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, 14:]
    out = torch.empty(0)
    with torch.no_grad():
        out = model(ids_BT[:, 14:], **inputs).logits
    assert largest_difference(out, expected) < 2e-5
    cache.crop(-6)
    if recent:
        with pytest.raises(CacheError, match=r"cannot crop 1 tokens .* rollback=1"):
            cache.crop(-1)
        assert {int(layer.get_seq_length()) for layer in cache.layers} == {14}
    cache.crop(-14)
    assert int(cache.get_seq_length()) == 0
    again = stepwise(model, tokens(2, 6), (), cache)
    assert largest_difference(again, stepwise(model, tokens(2, 6), ())) < 2e-5


def test_crop_without_rollback(llama: Tiny) -> None:
    """Possible as long as no token has left the ring."""
    llama.attach(ranks=llama.ragged(1), sink=3, recent=4)
    cache: Any = StaticLatentCache(llama.model, ROOM)
    assert not cache.is_croppable
    ids = tokens(1, 9)
    stepwise(llama.model, ids[:, :7], (7,), cache)
    cache.crop(-3)
    out = stepwise(llama.model, ids[:, 4:], (), cache)
    assert largest_difference(out, stepwise(llama.model, ids, (4,))[:, 4:]) < 2e-5
    with pytest.raises(CacheError, match=r"cannot crop 1 tokens"):
        cache.crop(-1)


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
