"""What a cache holds, and hands to attention."""

from matkv.latents.latents import Exact, Latents
from matkv.latents.layer import LayerProjection

__all__ = ["Exact", "Latents", "LayerProjection"]
