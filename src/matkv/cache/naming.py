"""The name under which a model takes its cache: it changed in transformers 5.24."""

from __future__ import annotations

import inspect
from functools import cache as remembered
from typing import Any

from transformers import LlamaModel
from transformers.cache_utils import Cache

NAMES = ("cache", "past_key_values")


def cache_argument(model: Any, cache: Cache) -> dict[str, Cache]:
    """`cache` as a keyword of the forward pass, and of `generate`, of this model."""
    return {cache_name(type(model)): cache}


@remembered
def cache_name(kind: type) -> str:
    """What models of a class call their cache; the common name where their signature hides it."""
    for asked in (kind, LlamaModel):
        parameters = inspect.signature(asked.forward).parameters  # type: ignore[attr-defined]
        for name in NAMES:
            if name in parameters:
                return name
    raise AssertionError("transformers' own models take a cache")
