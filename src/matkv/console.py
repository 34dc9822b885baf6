"""What the command line prints: tables, bars and pictures. The library itself only logs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from matkv.artifact import Artifact
from matkv.evaluate import Row
from matkv.ranks import SIDES

# Results go to standard output, progress and notes to standard error: --json can be piped.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

SHADES = " ░▒▓█"


class _Rate(ProgressColumn):
    """Tokens a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s", style="cyan")


@contextmanager
def token_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` tokens with rate and time left; yields a setter of the tokens done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
        progress.update(task, completed=total)


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


def evaluation_table(title: str, rows: Sequence[Row]) -> Table:
    """Budgets with bytes a token and perplexity, against the full cache where it was measured."""
    table = Table(title=title, title_justify="left")
    for name in ("budget", "kept", "bytes/token", "perplexity", "× full"):
        table.add_column(name, justify="right")
    full = next((row.perplexity for row in rows if row.budget is None), None)
    for row in rows:
        table.add_row(
            "full cache" if row.budget is None else f"{row.budget:.1%}",
            f"{row.kept:.1%}",
            f"{row.bytes_per_token:,}",
            f"{row.perplexity:.2f}",
            "" if full is None else f"{row.perplexity / full:.3f}",
        )
    return table


def energy_picture(artifact: Artifact, blocks: int = 16) -> Table:
    """Where each layer's energy lies among its ordered columns, darker for more.

    Every character is a sixteenth of the columns, the most important first, averaged over KV heads;
    behind it the columns that hold 90% of the energy.
    """
    table = Table(title="energy of the bases, most important columns first", title_justify="left")
    table.add_column("layer", justify="right")
    for side in SIDES:
        table.add_column(f"{side}s", no_wrap=True)
        table.add_column("90% in", justify="right")
    for layer in artifact.geometry.growing:
        cells = []
        for side in SIDES:
            energy_D = artifact.bases[layer][side].energy_GD.mean(0)
            parts = [float(part.sum()) for part in energy_D.tensor_split(blocks)]
            cells += ["".join(map(_shade, parts)), f"{columns_holding(energy_D.tolist(), 0.9)}"]
        table.add_row(str(layer), *cells)
    return table


def columns_holding(energy: Sequence[float], share: float) -> int:
    """How many leading columns hold `share` of the energy."""
    held = 0.0
    for count, part in enumerate(energy, start=1):
        held += part
        if held >= share:
            return count
    return len(energy)


def _shade(part: float) -> str:
    """A shade for a part of the energy; each step is a factor of four."""
    steps = (0.004, 0.016, 0.064, 0.25)
    return SHADES[sum(part >= step for step in steps)]
