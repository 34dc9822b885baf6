"""Which layer of latents takes the place of a layer of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from matkv.cache.layer import HoldsLatents, LatentLayer
from matkv.cache.padding import Starts
from matkv.cache.sliding import SlidingLatentLayer, SlidingStaticLatentLayer
from matkv.cache.static import StaticLatentLayer
from matkv.latents.layer import LayerProjection


@dataclass(frozen=True)
class Seats:
    """Makes the layers of one cache.

    Those that grow reserve room for `max_cache_len` tokens. Static ones have room for `room`, and
    for `rollback` exact tokens more, and share their `starts`.
    """

    max_cache_len: int | None
    room: int
    rollback: int
    starts: Starts = field(default_factory=Starts)

    def take(self, layer: Any, projection: LayerProjection) -> HoldsLatents | None:
        """The successor of a layer, itself where it holds tokens of the same bases; None if none.

        Raises:
            CacheError: it holds tokens of another model or of other bases.
        """
        if isinstance(layer, HoldsLatents):
            return layer.follow(projection)
        if _is_growing(layer, projection):
            kind = LatentLayer if projection.window is None else SlidingLatentLayer
            return kind(projection, self.max_cache_len)
        return self._static(layer, projection) if _is_static(layer, projection) else None

    def _static(self, layer: Any, projection: LayerProjection) -> StaticLatentLayer:
        """A static layer's successor, which has its tensors if the other had."""
        kind = StaticLatentLayer if projection.window is None else SlidingStaticLatentLayer
        seat = kind(projection, self.room, rollback=self.rollback, starts=self.starts)
        if layer.keys is not None and layer.values is not None:
            seat.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
        return seat


def _is_growing(layer: Any, projection: LayerProjection) -> bool:
    """Whether a growing layer of transformers' can be replaced."""
    is_alike = type(layer) is DynamicLayer
    if type(layer) is DynamicSlidingWindowLayer:
        is_alike = layer.sliding_window == projection.window
    return is_alike and not layer.is_initialized


def _is_static(layer: Any, projection: LayerProjection) -> bool:
    """Whether a static layer of transformers' can be replaced."""
    is_alike = type(layer) is StaticLayer
    if type(layer) is StaticSlidingWindowLayer:
        is_alike = layer.max_cache_len <= (projection.window or 0)
    return is_alike and not layer.get_seq_length()
