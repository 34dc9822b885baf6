"""Where commands print: results to standard output, notes to standard error."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

# Results go to standard output, progress and notes to standard error: --json can be piped.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    """Machine-readable output: NaN, which JSON lacks, becomes null."""
    print(json.dumps(_without_nan(data), indent=1))


def _without_nan(data: Any) -> Any:
    if isinstance(data, float) and data != data:
        return None
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return data
