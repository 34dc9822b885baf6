"""The seam with transformers."""

from matkv.hf.attach import attach, attached, attached_table, detach, identified
from matkv.hf.function import handled, register
from matkv.hf.geometry import geometry_of
from matkv.hf.observe import collect_moments
from matkv.hf.weights import fingerprint

__all__ = [
    "attach",
    "attached",
    "attached_table",
    "collect_moments",
    "detach",
    "fingerprint",
    "geometry_of",
    "handled",
    "identified",
    "register",
]
