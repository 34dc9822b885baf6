"""matkv: compress the KV cache of pretrained language models along the feature dimension."""

from matkv.artifact.artifact import Artifact
from matkv.cache.cache import LatentCache
from matkv.calibrate import CalibrateConfig, calibrate
from matkv.errors import MatkvError
from matkv.hf.attach import attach, detach
from matkv.models.load import load_model
from matkv.ranks import RankTable

__all__ = [
    "Artifact",
    "CalibrateConfig",
    "LatentCache",
    "MatkvError",
    "RankTable",
    "attach",
    "calibrate",
    "detach",
    "load_model",
]
__version__ = "0.1.0"
