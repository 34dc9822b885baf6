"""Layers of one query's tests, with codes and without, and tokens in them.

Shapes: B batch, G KV head, N and T token, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from matkv.bases.quantizer import fit
from matkv.cache.layer import LatentLayer
from matkv.latents.coding import SideCoding
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection
from matkv.ranks import LayerBands, LayerRanks
from one_query import KEY, VALUE, D, G

RANKS: dict[str, tuple[LayerRanks, LayerRanks]] = {
    "full": ((D,) * G, (D,) * G),
    "uniform": ((8,) * G, (8,) * G),
    "odd": ((3, 13, 1, 7), (5, 3, 23, 1)),
    "one width": ((4, 10, 6, 12), (12, 6, 10, 4)),
    "zero": ((0, 24, 0, 5), (9, 0, 0, 24)),
    "all zero": ((0,) * G, (0,) * G),
}
NONE, PLAIN = (0, 0, 0, 0), (7, 0, 0, 0)
BANDS: dict[str, tuple[LayerBands, LayerBands]] = {
    "eight": (((0, 9, 0, 0),) * G, ((0, 24, 0, 0),) * G),
    "four": (((0, 0, 9, 0),) * G, ((0, 0, 24, 0),) * G),
    "two": (((0, 0, 0, 9),) * G, ((0, 0, 0, 24),) * G),
    "mixed": (
        ((3, 1, 5, 7), (0, 2, 3, 1), (1, 0, 7, 6), (5, 3, 0, 13)),
        ((1, 2, 2, 19), (4, 0, 1, 5), (0, 6, 9, 0), (2, 7, 1, 0)),
    ),
    "key without": ((NONE, (0, 3, 5, 2), PLAIN, NONE), ((0, 3, 5, 2), NONE, (0, 0, 3, 0), PLAIN)),
    "only one coded": ((PLAIN, PLAIN, (0, 0, 0, 1), NONE), (PLAIN, NONE, NONE, NONE)),
    "plain": ((PLAIN,) * G, (PLAIN, NONE, PLAIN, PLAIN)),
    "nothing": ((NONE,) * G, (NONE,) * G),
}
MIXED = BANDS["mixed"]


def plain_layer(ranks: tuple[LayerRanks, LayerRanks], batch: int, length: int) -> Latents:
    """What a cache hands on: rows that are views of longer buffers."""
    generator = torch.Generator().manual_seed(length)
    key_BGTD, value_BGTD = torch.randn(2, batch, G, length, D, generator=generator)
    latents: Latents = LatentLayer(LayerProjection(KEY, VALUE, *ranks)).update(
        key_BGTD, value_BGTD
    )[0]
    return latents


def banded(bands: tuple[LayerBands, LayerBands], **options: Any) -> LayerProjection:
    """Quantizers fitted to states like those of `coded_layer`."""
    states = torch.randn(2, G, 200, D, generator=torch.Generator().manual_seed(0))
    key, value = (
        SideCoding(own, fit(states_GND @ maps.encode_XDD))
        for own, states_GND, maps in zip(bands, states, (KEY, VALUE), strict=True)
    )
    ranks = [tuple(map(sum, own)) for own in bands]
    return LayerProjection(KEY, VALUE, *ranks, coding=(key, value), **options)


def coded_layer(
    bands: tuple[LayerBands, LayerBands], batch: int, length: int, **options: Any
) -> Latents:
    """What a cache hands on: views of longer buffers, of tokens whose gains differ."""
    generator = torch.Generator().manual_seed(length)
    size_BGT1 = torch.rand(2, batch, G, length, 1, generator=generator) + 0.1
    states = torch.randn(2, batch, G, length, D, generator=generator) * size_BGT1
    latents: Latents = LatentLayer(banded(bands, **options)).update(*states)[0]
    return latents
