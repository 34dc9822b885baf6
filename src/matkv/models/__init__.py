"""Models and tokenizers, by name."""

from matkv.models.default import DEFAULT_MODEL
from matkv.models.load import load_config, load_model

__all__ = ["DEFAULT_MODEL", "load_config", "load_model"]
