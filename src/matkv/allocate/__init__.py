"""Allocate: the right rank for every layer, KV head and side."""

from matkv.allocate.config import AllocateConfig, Constraints
from matkv.allocate.stage import allocate

__all__ = ["AllocateConfig", "Constraints", "allocate"]
