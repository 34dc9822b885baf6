"""Evaluators of sentence-transformers for what the commands read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.util import cos_sim
from torch import Tensor

from matkv.embeddings.data import Retrieval, Scored
from matkv.files import digest


def similarity_evaluator(pairs: Scored, batch_size: int = 32) -> BaseEvaluator:
    """Spearman's correlation of the cosine with the scores."""
    return EmbeddingSimilarityEvaluator(
        pairs.first,
        pairs.second,
        pairs.scores,
        batch_size=batch_size,
        main_similarity="cosine",
        write_csv=False,
    )


def retrieval_evaluator(data: Retrieval, batch_size: int = 32) -> BaseEvaluator:
    """nDCG@10 of the documents that are closest by cosine to each query."""
    cosine: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cos_sim}
    return InformationRetrievalEvaluator(
        dict(data.queries),
        dict(data.corpus),
        dict(data.relevant),
        batch_size=batch_size,
        score_functions=cosine,
        main_score_function="cosine",
        write_csv=False,
    )


def data_digest(*parts: Any) -> str:
    """A short name of what was measured with."""
    return digest(repr(parts).encode())
