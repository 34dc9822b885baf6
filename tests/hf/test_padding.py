"""Padding belongs to a batch and its cache: nothing that happens to the model changes it.

Shapes: B batch, T token.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import matkv
from coded import room
from tiny import Tiny, build, greedy, largest_difference, left_padded, stepwise, tiny, tokens

TOLERANCE = 5e-5
PROMPTS = [tokens(1, length, seed=length) for length in (15, 6, 11, 2)]
EXACT = pytest.mark.parametrize(("sink", "recent"), [(3, 0), (0, 4), (3, 4)])


def positions(mask_BT: Tensor) -> Tensor:
    return (mask_BT.cumsum(-1) - 1).clamp_min(0)


def test_threads_that_share_a_model_keep_their_own_padding(llama: Tiny) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=3, recent=2)
    batches = [left_padded([PROMPTS[i] for i in picks]) for picks in ((0, 1), (3, 2), (2, 0, 3))]

    def answer(batch: int) -> Tensor:
        ids_BT, mask_BT = batches[batch]
        return greedy(model, ids_BT, 12, attention_mask=mask_BT)

    alone = [answer(batch) for batch in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for batch, out in zip([0, 1, 2] * 4, pool.map(answer, [0, 1, 2] * 4), strict=True):
            assert torch.equal(out, alone[batch])


# What happens to a padded cache between two steps: the cache afterwards, and the rows it holds.
def reordered(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([3, 1, 1, 0]))
    return cache


def selected(cache: Any) -> Any:
    cache.batch_select_indices(torch.tensor([2, 1]))
    return cache


EVENTS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "nothing": (lambda cache: cache, [0, 1, 2, 3]),
    "reordered": (reordered, [3, 1, 1, 0]),
    "selected": (selected, [2, 1]),
    "copied": (lambda cache: reordered(copy.deepcopy(cache)), [3, 1, 1, 0]),
    "pickled": (lambda cache: reordered(pickle.loads(pickle.dumps(cache))), [3, 1, 1, 0]),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", EVENTS)
@torch.no_grad()
def test_a_padded_cache_goes_on_as_it_began(llama: Tiny, name: str, again: bool) -> None:
    event, rows = EVENTS[name]
    model = llama.attach(ranks=llama.ragged(1), sink=3)
    ids_BT, mask_BT = left_padded(PROMPTS)
    more_BT = tokens(4, 3, seed=9)
    mask_BT = torch.cat((mask_BT, torch.ones(4, 3, dtype=torch.long)), dim=1)[rows]
    cache: Any = matkv.LatentCache(model)
    stepwise(model, ids_BT, (9, 6), cache, left_padded(PROMPTS)[1])
    if again:
        llama.attach(ranks=llama.ragged(1), sink=3)
    model(*left_padded(PROMPTS[::-1]))
    cache = event(cache)
    inputs = {"attention_mask": mask_BT, "position_ids": positions(mask_BT)[:, -3:]}
    out = model(more_BT[rows], past_key_values=cache, **inputs).logits
    for place, row in enumerate(rows):
        whole = torch.cat((PROMPTS[row], more_BT[row : row + 1]), dim=1)
        alone = model(whole, use_cache=False).logits[:, -3:]
        assert largest_difference(out[place : place + 1], alone) < TOLERANCE


@torch.no_grad()
def test_a_padded_cache_that_was_reset_takes_an_unpadded_batch(llama: Tiny) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=2, recent=2)
    cache = matkv.LatentCache(model)
    ids_BT, mask_BT = left_padded(PROMPTS)
    for again in (cache.reset, lambda: cache.crop(-2)):
        stepwise(model, ids_BT[:, :2], (2,), cache, mask_BT[:, :2])
        again()
        for inputs in ({}, {"attention_mask": torch.ones(4, 9, dtype=torch.long)}):
            out = model(tokens(4, 9), past_key_values=cache, **inputs).logits
            assert largest_difference(out, model(tokens(4, 9), use_cache=False).logits) < TOLERANCE
            cache.reset()


@EXACT
@torch.no_grad()
def test_a_crop_into_the_padding_and_tokens_in_its_place(
    llama: Tiny, sink: int, recent: int
) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent)
    ids_BT, mask_BT = left_padded(PROMPTS)
    cache: Any = matkv.LatentCache(model)
    cache.activate_past_recording()
    stepwise(model, ids_BT, (9, 6), cache, mask_BT)
    cache.crop(-11)
    more_BT = tokens(4, 12, seed=8)
    mask_BT = torch.cat((mask_BT[:, :4], torch.ones_like(more_BT)), dim=1)
    inputs = {"attention_mask": mask_BT, "position_ids": positions(mask_BT)[:, 4:]}
    out = model(more_BT, past_key_values=cache, **inputs).logits
    for row in range(4):
        kept_BT = ids_BT[row : row + 1, :4][:, mask_BT[row, :4].bool()]
        whole_BT = torch.cat((kept_BT, more_BT[row : row + 1]), dim=1)
        alone = model(whole_BT, use_cache=False).logits[:, -12:]
        assert largest_difference(out[row : row + 1], alone) < TOLERANCE


@EXACT
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradients_of_two_padded_batches_under_checkpointing(sink: int, recent: int) -> None:
    model, subject = build("llama"), tiny("llama")
    matkv.attach(model, subject.artifact, ranks=subject.ragged(1), sink=sink, recent=recent)
    batches = [left_padded(PROMPTS[:2]), left_padded(PROMPTS[:3])]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        losses = [
            model(ids_BT, attention_mask=mask_BT, use_cache=False).logits[mask_BT.bool()]
            for ids_BT, mask_BT in batches
        ]
        sum(loss.square().mean() for loss in losses).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable()
    for one, other in zip(gradients(), plain, strict=True):
        assert largest_difference(one, other) < 1e-4 * float(other.abs().max())


# ---- padding among the tokens


@EXACT
@pytest.mark.parametrize("prefix", [2, 9])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_tails_of_unequal_length_after_a_cached_prefix(
    llama: Tiny, sink: int, recent: int, prefix: int, side: str
) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent)
    start, tails = tokens(1, prefix, seed=3), [tokens(1, n, seed=n) for n in (7, 1, 3)]
    tail_BT, real_BT = left_padded(tails)
    if side == "right":
        tail_BT = torch.cat([torch.nn.functional.pad(t, (0, 7 - t.shape[1])) for t in tails])
        real_BT = (tail_BT != 0).long()
    more_BT = tokens(3, 8, seed=5)
    ids_BT = torch.cat((start.expand(3, -1), tail_BT, more_BT), dim=1)
    ones = torch.ones(3, prefix, dtype=torch.long), torch.ones(3, 8, dtype=torch.long)
    mask_BT = torch.cat((ones[0], real_BT, ones[1]), dim=1)
    for steps in ((prefix, 7), (prefix, 4, 3, 5), (prefix + 7,), (prefix + 15,)):
        out = stepwise(model, ids_BT, steps, matkv.LatentCache(model), mask_BT)
        for row, tail in enumerate(tails):
            whole = torch.cat((start, tail, more_BT[row : row + 1]), dim=1)
            alone = model(whole, use_cache=False).logits
            found = out[row : row + 1, mask_BT[row].bool()]
            assert largest_difference(found, alone) < room(llama, TOLERANCE)


@EXACT
@torch.no_grad()
def test_rows_that_pause_while_others_go_on(llama: Tiny, sink: int, recent: int) -> None:
    """Padding that comes one slot at a time, and a crop back into it."""
    model = llama.attach(ranks=llama.ragged(1), sink=sink, recent=recent)
    generator = torch.Generator().manual_seed(4)
    mask_BT = (torch.rand(4, 40, generator=generator) < 0.6).long()
    ids_BT = tokens(4, 40)
    cache: Any = matkv.LatentCache(model)
    cache.activate_past_recording()
    out = stepwise(model, ids_BT, (5, 1, 6), cache, mask_BT)
    inputs = {"attention_mask": mask_BT, "position_ids": positions(mask_BT)}
    cache.crop(-17)
    tail = {"attention_mask": mask_BT, "position_ids": inputs["position_ids"][:, 23:]}
    again = model(ids_BT[:, 23:], past_key_values=cache, **tail).logits
    assert (
        largest_difference(again[mask_BT[:, 23:].bool()], out[:, 23:][mask_BT[:, 23:].bool()])
        < TOLERANCE
    )
    uncached = model(ids_BT, use_cache=False, **inputs)
    for row in range(4):
        real_T = mask_BT[row].bool()
        alone = model(ids_BT[row : row + 1, real_T], use_cache=False).logits
        assert largest_difference(out[row : row + 1, real_T], alone) < TOLERANCE
        assert largest_difference(uncached.logits[row : row + 1, real_T], alone) < TOLERANCE
