"""What is kept of a run, and said of it."""

from matkv.artifact.artifact import Artifact
from matkv.artifact.lora import Lora
from matkv.artifact.results import Kind, Results, load_rows
from matkv.artifact.setting import Setting

__all__ = ["Artifact", "Kind", "Lora", "Results", "Setting", "load_rows"]
