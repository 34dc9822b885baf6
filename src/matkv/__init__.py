"""matkv: compress the KV cache of pretrained language models along the feature dimension."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from matkv.artifact.artifact import Artifact
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.errors import (
    ArtifactError,
    BudgetError,
    CacheError,
    DataError,
    FingerprintError,
    MatkvError,
    ModelError,
    RankError,
    SizeError,
    TrainingError,
    UnsupportedModelError,
)
from matkv.ranks import RankTable

if TYPE_CHECKING:
    from matkv.cache.cache import LatentCache
    from matkv.hf.attach import attach, attached, detach
    from matkv.hf.shrink import shrink
    from matkv.models.load import load_model

__all__ = [
    "Artifact",
    "ArtifactError",
    "BudgetError",
    "CacheError",
    "CalibrateConfig",
    "DataError",
    "FingerprintError",
    "LatentCache",
    "MatkvError",
    "ModelError",
    "RankError",
    "RankTable",
    "SizeError",
    "TrainingError",
    "UnsupportedModelError",
    "attach",
    "attached",
    "calibrate",
    "detach",
    "load_model",
    "shrink",
]
__version__ = "0.1.0"
# Imported when asked for: what stands upon transformers needs seconds.
LAZY = {
    "LatentCache": "cache.cache",
    "attach": "hf.attach",
    "attached": "hf.attach",
    "detach": "hf.attach",
    "shrink": "hf.shrink",
    "load_model": "models.load",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"matkv.{LAZY[name]}"), name)
