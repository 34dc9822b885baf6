"""Randomness of one's own, where a library draws from the global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed torch's global generators meanwhile; give all global ones back as they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
