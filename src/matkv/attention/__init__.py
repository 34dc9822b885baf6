"""Attention on latents."""

from matkv.attention.latent import attend

__all__ = ["attend"]
