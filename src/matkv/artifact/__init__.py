"""What is kept of a run, and said of it."""

from matkv.artifact.artifact import Artifact, digest
from matkv.artifact.lora import Lora
from matkv.artifact.results import load_rows, save_rows

__all__ = ["Artifact", "Lora", "digest", "load_rows", "save_rows"]
