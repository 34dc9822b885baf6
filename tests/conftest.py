"""Fixtures: tiny models that every test hands back detached."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when torch is imported: idle OpenMP threads sleep instead of taking a core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Triton reads this when it is imported, which transformers does: without a GPU, kernels run under
# Triton's interpreter, on a machine with one they are compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import matkv
from tiny import FAMILIES, RELATED, Tiny, tiny


def _give_back(subject: Tiny) -> None:
    """Leave a shared model as it was: training freezes its weights."""
    matkv.detach(subject.model)
    subject.model.requires_grad_(True)


@pytest.fixture(params=FAMILIES)
def any_family(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    """A tiny model of each family in turn."""
    subject = tiny(request.param)
    yield subject
    _give_back(subject)


@pytest.fixture(params=[name for name in FAMILIES if name not in RELATED])
def family(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    """A tiny model of each family that differs from the others."""
    subject = tiny(request.param)
    yield subject
    _give_back(subject)


@pytest.fixture
def llama() -> Iterator[Tiny]:
    subject = tiny("llama")
    yield subject
    _give_back(subject)


@pytest.fixture(params=[name for name in FAMILIES if name not in RELATED])
def ranked_family(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    """`family` where tables have codes elsewhere in a folder."""
    subject = tiny(request.param)
    yield subject
    _give_back(subject)


@pytest.fixture
def ranked_llama() -> Iterator[Tiny]:
    """`llama` where tables have codes elsewhere in a folder."""
    subject = tiny("llama")
    yield subject
    _give_back(subject)


@pytest.fixture
def gemma3() -> Iterator[Tiny]:
    """Sliding and growing layers in turn."""
    subject = tiny("gemma3")
    yield subject
    _give_back(subject)
