"""The name under which a model takes its cache: it changed in transformers 5.24."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as remembered
from typing import Any

from transformers import LlamaModel
from transformers.cache_utils import Cache

NAMES = ("cache", "past_key_values")


def cache_argument(model: Any, cache: Cache | None) -> dict[str, Cache]:
    """`cache`, if there is one, as a keyword of this model's forward pass and of its `generate`."""
    return {} if cache is None else {cache_name(type(model).forward): cache}


@remembered
def cache_name(forward: Callable[..., Any]) -> str:
    """What a forward pass calls its cache; the common name where its signature hides it."""
    for asked in (forward, LlamaModel.forward):
        parameters = inspect.signature(asked).parameters
        for name in NAMES:
            if name in parameters:
                return name
    raise AssertionError("transformers' own models take a cache")
