"""Where commands print: results to standard output, notes to standard error."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

from rich.console import Console
from rich.status import Status
from rich.text import Text

# Results go to standard output, progress and notes to standard error: --json can be piped.
# Without markup: a name such as [/red] is a name.
out = Console(highlight=False, markup=False)
err = Console(stderr=True, highlight=False, markup=False)


def status(note: str) -> Status:
    """A note with a spinner on standard error, while something lasts."""
    return err.status(Text(note))


def complain(message: str) -> None:
    """An error in one line."""
    err.print(Text.assemble(("error:", "red"), f" {' '.join(message.split())}"), soft_wrap=True)


def refuse(message: str) -> NoReturn:
    """End with an error and exit code 2."""
    complain(message)
    sys.exit(2)


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
