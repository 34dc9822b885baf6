"""Caches of latents, as transformers' caches."""

from matkv.cache.cache import (
    LatentCache,
    StaticLatentCache,
    full_states,
    new_cache,
    refill,
    storage_nbytes,
)
from matkv.cache.layer import LatentLayer

__all__ = [
    "LatentCache",
    "LatentLayer",
    "StaticLatentCache",
    "full_states",
    "new_cache",
    "refill",
    "storage_nbytes",
]
