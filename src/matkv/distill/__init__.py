"""Distill: train the bases of an artifact."""

from matkv.distill.config import DistillConfig
from matkv.distill.stage import distill

__all__ = ["DistillConfig", "distill"]
