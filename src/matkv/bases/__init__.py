"""Bases: made from moments, learned, truncated."""

from matkv.bases.learned import LearnedMaps
from matkv.bases.maps import Maps, SideBases
from matkv.bases.moments import column_energy, key_maps, value_maps

__all__ = ["LearnedMaps", "Maps", "SideBases", "column_energy", "key_maps", "value_maps"]
