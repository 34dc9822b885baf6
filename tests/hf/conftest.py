"""Every test of the seam with transformers runs on ranks and on codes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coded import KINDS, lent
from tiny import FAMILIES, RELATED, Tiny


@pytest.fixture(params=KINDS)
def llama(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    yield from lent(request.param, "llama")


@pytest.fixture(params=KINDS)
def gemma3(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    yield from lent(request.param, "gemma3")


@pytest.fixture(
    params=[(kind, name) for kind in KINDS for name in FAMILIES if name not in RELATED],
    ids="-".join,
)
def family(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    yield from lent(*request.param)


@pytest.fixture(params=[(kind, name) for kind in KINDS for name in FAMILIES], ids="-".join)
def any_family(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    yield from lent(*request.param)
