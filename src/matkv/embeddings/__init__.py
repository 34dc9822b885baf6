"""Embedding models of many sizes: the first layers and first dimensions are good smaller models.

A ladder of sizes (layer, dimension) is trained at once (Starbucks, arXiv 2410.13230), around any
loss of sentence-transformers and by its Trainer; every size is then served as an ordinary model.

    rungs      sizes as text, and schedules over them
    depth      where a backbone keeps its layers, and how it is cut
    layers     embeddings of many layers from one pass
    loss       LadderLoss
    serve      truncate, truncated
    evaluator  RungEvaluator, rung_table
    pretrain   masked autoencoding over the same sizes
    data load config train      what the commands need
"""

from __future__ import annotations

from matkv.errors import MatkvError

try:
    import sentence_transformers  # noqa: F401
except ImportError as error:
    raise MatkvError(
        "embedding models need the package sentence-transformers: pip install sentence-transformers"
    ) from error

from matkv.embeddings.evaluator import RungEvaluator, RungTable, rung_table
from matkv.embeddings.layers import encode_rungs
from matkv.embeddings.loss import LadderLoss
from matkv.embeddings.rungs import Size, default_rungs, ladder, parse
from matkv.embeddings.serve import truncate, truncated

__all__ = [
    "LadderLoss",
    "RungEvaluator",
    "RungTable",
    "Size",
    "default_rungs",
    "encode_rungs",
    "ladder",
    "parse",
    "rung_table",
    "truncate",
    "truncated",
]
