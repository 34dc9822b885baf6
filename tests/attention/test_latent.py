"""Attention on latents: the fast path against explicit scores, and both against plain algebra.

Shapes: B batch, H query head, G KV head, Q query, T token, D head dim.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from explicit import attend_explicit
from matkv.attention.latent import attend
from matkv.cache.layer import LatentLayer
from matkv.errors import UnsupportedModelError
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection
from matkv.ranks import LayerRanks
from tiny import largest_difference, random_maps

B, G, J, T, D = 2, 4, 3, 11, 8
SCALING = 0.4
KEY, VALUE = random_maps(G, D, 1, oblique=True), random_maps(G, D, 2)
RANKS: list[tuple[LayerRanks, LayerRanks]] = [
    ((D,) * G, (D,) * G),
    ((4,) * G, (4,) * G),
    ((2,) * G, (6,) * G),
    ((3, 5, 3, 1), (7, 1, 7, 3)),
    ((0, 0, 4, 8), (8, 0, 0, 5)),
]
every_rank = pytest.mark.parametrize(("key_ranks", "value_ranks"), RANKS)


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states() -> tuple[Tensor, Tensor]:
    return random_tensor(B, G, T, D, seed=5), random_tensor(B, G, T, D, seed=6)


def latents_of(key_ranks: LayerRanks, value_ranks: LayerRanks) -> Latents:
    projection = LayerProjection(KEY, VALUE, key_ranks, value_ranks)
    return Latents(projection, projection.encode(*states()))


def causal(queries: int) -> Tensor:
    return torch.ones(queries, T, dtype=torch.bool).tril(T - queries).expand(B, 1, queries, T)


def padded(queries: int) -> Tensor:
    """The second sequence has four positions of padding on the left."""
    mask = causal(queries).clone()
    mask[1, :, :, :4] = False
    return mask


def masks(queries: int) -> dict[str, Tensor | None]:
    lowest = torch.finfo(torch.float32).min
    return {
        "none": None,
        "causal": causal(queries),
        "padded": padded(queries),
        "broadcast": causal(queries)[:1],
        "float": torch.where(padded(queries), 0.0, -torch.inf),
        "lowest": torch.where(padded(queries), 0.0, lowest),
        "bias": torch.where(padded(queries), random_tensor(B, 1, queries, T, seed=8), lowest),
    }


def truncated(states_BGTD: Tensor, maps: Any, ranks: LayerRanks) -> Tensor:
    """Full-width states with what the ranks drop taken away."""
    heads = [
        states_BGTD[:, g] @ maps.encode_XDD[g, :, :r] @ maps.decode_XDD[g, :, :r].T
        for g, r in enumerate(ranks)
    ]
    return torch.stack(heads, dim=1)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, queries: int
) -> Tensor:
    """Softmax attention as it is written in books."""
    mask = causal(queries) if mask is None else mask
    bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
    scores = query @ key.repeat_interleave(J, 1).mT * SCALING + bias
    return scores.softmax(-1) @ value.repeat_interleave(J, 1)


def seen(mask: Tensor | None, queries: int) -> Tensor:
    """Which queries see any token; the others are padding, whose output nobody reads.  [BQ]"""
    mask = causal(queries) if mask is None else mask
    visible = mask if mask.dtype == torch.bool else mask > -1e30
    return visible.any(-1).expand(B, 1, queries)[:, 0]


@every_rank
@pytest.mark.parametrize("mask", masks(1))
@pytest.mark.parametrize("queries", [1, 5, T])
def test_both_paths_equal_attention_on_truncated_states(
    key_ranks: LayerRanks, value_ranks: LayerRanks, mask: str, queries: int
) -> None:
    latents = latents_of(key_ranks, value_ranks)
    query_BHQD = random_tensor(B, G * J, queries, D, seed=7)
    mask_tensor = masks(queries)[mask]
    key_BGTD, value_BGTD = states()
    key_BGTD, value_BGTD = (
        truncated(key_BGTD, KEY, key_ranks),
        truncated(value_BGTD, VALUE, value_ranks),
    )
    expected = plain_attention(query_BHQD, key_BGTD, value_BGTD, mask_tensor, queries)
    keep_BQ = seen(mask_tensor, queries)
    for function in (attend, attend_explicit):
        out_BHQD = function(latents, query_BHQD, mask_tensor, scaling=SCALING)
        assert out_BHQD.shape == query_BHQD.shape
        assert bool(out_BHQD.isfinite().all())
        got, wanted = (x.transpose(1, 2)[keep_BQ] for x in (out_BHQD, expected))
        assert largest_difference(got, wanted) < 1e-5


@every_rank
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 5])
def test_half_precision_is_close(
    key_ranks: LayerRanks, value_ranks: LayerRanks, dtype: torch.dtype, queries: int
) -> None:
    latents = latents_of(key_ranks, value_ranks)
    query_BHQD = random_tensor(B, G * J, queries, D, seed=7)
    expected = attend(latents, query_BHQD, None, scaling=SCALING)
    projection = LayerProjection(KEY, VALUE, key_ranks, value_ranks).to(dtype)
    half = Latents(projection, projection.encode(*(x.to(dtype) for x in states())))
    for function in (attend, attend_explicit):
        out_BHQD = function(half, query_BHQD.to(dtype), None, scaling=SCALING)
        assert out_BHQD.dtype == dtype
        assert largest_difference(out_BHQD, expected) < 0.1


@every_rank
@pytest.mark.parametrize(("sink", "recent"), [(2, 0), (0, 3), (2, 3), (99, 0), (0, 99)])
def test_exact_tokens_are_attended_at_full_width(
    key_ranks: LayerRanks, value_ranks: LayerRanks, sink: int, recent: int
) -> None:
    projection = LayerProjection(KEY, VALUE, key_ranks, value_ranks, sink=sink, recent=recent)
    key_BGTD, value_BGTD = states()
    latents, _ = LatentLayer(projection).update(key_BGTD, value_BGTD)
    query_BHQD = random_tensor(B, G * J, T, D, seed=7)
    out_BHQD = attend(latents, query_BHQD, None, scaling=SCALING)

    distance_QT = torch.arange(T)[:, None] - torch.arange(T)[None]
    near_QT = distance_QT <= recent if recent else torch.zeros(T, T, dtype=torch.bool)
    exact_QT = near_QT | (torch.arange(T) < sink)
    short = truncated(key_BGTD, KEY, key_ranks), truncated(value_BGTD, VALUE, value_ranks)
    for query in range(T):
        exact_T1 = exact_QT[query][:, None]
        key, value = (
            torch.where(exact_T1, full, cut)
            for full, cut in zip((key_BGTD, value_BGTD), short, strict=True)
        )
        mask = causal(T)[:, :, query : query + 1]
        expected = plain_attention(query_BHQD[:, :, query : query + 1], key, value, mask, 1)
        assert largest_difference(out_BHQD[:, :, query : query + 1], expected) < 1e-5


def test_dropout_zeroes_weights_and_keeps_their_mean() -> None:
    latents = latents_of((D,) * G, (D,) * G)
    query_BHQD = random_tensor(B, G * J, 1, D, seed=7)
    exact = attend(latents, query_BHQD, None, scaling=SCALING)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = [
            attend(latents, query_BHQD, None, scaling=SCALING, dropout=0.3) for _ in range(600)
        ]
    assert largest_difference(draws[0], draws[1]) > 1e-2
    assert largest_difference(torch.stack(draws).mean(0), exact) < 0.25


@pytest.mark.parametrize(
    "shape", [(B, G * J, 5, T), (B, 1, 4, T), (B, 1, 5, T - 1), (B, T)], ids=str
)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedModelError, match="attention mask of shape"):
        attend(
            latents_of(*RANKS[0]),
            random_tensor(B, G * J, 5, D),
            torch.ones(shape, dtype=torch.bool),
            scaling=SCALING,
        )
