"""Data sets of the hub: what was fetched before serves at once where the hub does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from matkv.files import hub_answers


@contextmanager
def hub_or_fetched() -> Iterator[None]:
    """Inside, `datasets` asks the hub only if it answers: else it would for half a minute."""
    if hub_answers():
        yield
        return
    import datasets.config

    with patch.object(datasets.config, "HF_HUB_OFFLINE", True):
        yield
