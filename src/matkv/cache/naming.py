"""The name under which a model takes its cache: it changed in transformers 5.24."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as remembered
from typing import Any

from transformers import LlamaModel
from transformers.cache_utils import Cache

NAMES = ("cache", "past_key_values")


def cache_argument(model: Any, cache: Cache) -> dict[str, Cache]:
    """`cache` as a keyword of the forward pass, and of `generate`, of this model."""
    return {cache_name(type(model).forward): cache}


@remembered
def cache_name(forward: Callable[..., Any]) -> str:
    """What a forward pass calls its cache; the common name where its signature hides it."""
    for asked in (forward, LlamaModel.forward):
        parameters = inspect.signature(asked).parameters
        for name in NAMES:
            if name in parameters:
                return name
    raise AssertionError("transformers' own models take a cache")
