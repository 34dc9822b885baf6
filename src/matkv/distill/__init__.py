"""Distill: train the bases of an artifact."""

from typing import TYPE_CHECKING, Any

from matkv.distill.config import DistillConfig

if TYPE_CHECKING:
    from matkv.distill.stage import distill

__all__ = ["DistillConfig", "distill"]


def __getattr__(name: str) -> Any:
    """The stage brings transformers' Trainer, which takes seconds to import: only when it runs."""
    if name != "distill":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from matkv.distill.stage import distill

    return distill
