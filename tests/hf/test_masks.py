"""Masks of a user's own: a prefix that sees all of itself, with and without a cache.

Shapes: Q query, T token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import matkv
from tiny import Tiny, greedy, largest_difference, tokens

TOLERANCE = 5e-5
EXACT = pytest.mark.parametrize(("sink", "recent"), [(0, 0), (3, 0), (0, 4), (3, 4)])
PREFIX, LENGTH = 11, 16


def prefix_mask(dtype: torch.dtype = torch.bool) -> Tensor:
    """[1 1 T T]"""
    sees_TT = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    sees_TT[:PREFIX, :PREFIX] = True
    mask = sees_TT[None, None]
    return mask if dtype == torch.bool else torch.where(mask, 0.0, torch.finfo(dtype).min)


def for_layers(model: Any, mask: Tensor) -> Any:
    """The mask as the model's decoder takes it: one for each kind of layer where they differ."""
    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
        return mask
    near_QT = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) < model.config.sliding_window
    hidden = torch.finfo(torch.float32).min
    near = mask & near_QT if mask.dtype == torch.bool else mask.masked_fill(~near_QT, hidden)
    return {"full_attention": mask, "sliding_attention": near}


def logits(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
    """All at once, or the prefix and then token by token."""
    if cache is None:
        out = model(ids, attention_mask=for_layers(model, mask), use_cache=False)
        return out.logits  # type: ignore[no-any-return]
    outs = [
        model(ids[:, :PREFIX], attention_mask=mask[..., :PREFIX, :PREFIX], past_key_values=cache)
    ]
    outs += [model(ids[:, t : t + 1], past_key_values=cache) for t in range(PREFIX, LENGTH)]
    return torch.cat([out.logits for out in outs], dim=1)


@EXACT
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@torch.no_grad()
def test_a_prefix_that_sees_all_of_itself(
    family: Tiny, sink: int, recent: int, dtype: torch.dtype
) -> None:
    model, ids, mask = family.model, tokens(2, LENGTH), prefix_mask(dtype)
    plain = logits(model, ids, mask)
    assert largest_difference(plain, model(ids).logits) > 1e-2
    family.attach(sink=sink, recent=recent)
    assert largest_difference(logits(model, ids, mask), plain) < TOLERANCE
    if isinstance(for_layers(model, mask), dict):
        return
    assert largest_difference(logits(model, ids, mask, matkv.LatentCache(model)), plain) < TOLERANCE
    family.attach(ranks=family.ragged(1), sink=sink, recent=recent)
    cached = logits(model, ids, mask, matkv.LatentCache(model))
    assert largest_difference(cached, logits(model, ids, mask)) < TOLERANCE


def test_a_mask_of_ones_and_one_of_the_users_own_generate_alike(llama: Tiny) -> None:
    model = llama.attach(ranks=llama.ragged(1), sink=2, recent=3)
    ids = tokens(2, LENGTH)
    causal = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with torch.no_grad():
        out = model(ids, attention_mask=causal).logits
        assert largest_difference(out, model(ids).logits) < TOLERANCE
    expected = greedy(model, ids, 6)
    assert torch.equal(greedy(model, ids, 6, attention_mask=torch.ones_like(ids)), expected)
