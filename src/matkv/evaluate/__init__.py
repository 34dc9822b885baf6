"""Evaluate: quality and bytes at every budget."""

from matkv.evaluate.texts import evaluate, perplexity, perplexity_rows

__all__ = [
    "evaluate",
    "perplexity",
    "perplexity_rows",
]
