"""matkv: compress the KV cache of pretrained language models along the feature dimension."""

from matkv.artifact.artifact import Artifact
from matkv.cache.cache import LatentCache
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
from matkv.hf.attach import attach, attached, detach
from matkv.models.load import load_model
from matkv.ranks import RankTable

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
]
__version__ = "0.1.0"
