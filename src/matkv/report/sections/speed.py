"""Speed and memory of a decoding step, from the rows of `matkv benchmark`."""

from __future__ import annotations

from collections.abc import Sequence

from matkv.report.page import Block, Cell, Missing, Section, Table
from matkv.report.pictures.decoding import (
    MEGABYTE,
    cache_panel,
    looks_of,
    step_panel,
    throughput_panel,
)
from matkv.report.pictures.figures import lines
from matkv.report.pictures.theme import Picture
from matkv.report.rows import Timed
from matkv.report.runs import Run, slug, styles, title_of

COMMAND = "matkv benchmark RUN"
NOTE = (
    "Speedup: over DynamicCache, with quartiles of rounds that took turns. Peak: weights, cache "
    "and what a step takes on top."
)


def speed_section(runs: Sequence[Run]) -> Section:
    """Time and bytes against context, and throughput where batches were measured."""
    blocks: list[Block] = []
    for run in runs:
        dtypes: dict[str, list[Timed]] = {}
        for row in run.read(Timed):
            dtypes.setdefault(row.dtype, []).append(row)
        for index, rows in enumerate(sorted(dtypes.values(), key=len, reverse=True)):
            name = "speed" if index == 0 else f"speed-{rows[0].dtype}"
            longest = max(row.context for row in rows)
            last = [row for row in rows if row.context == longest]
            blocks += [_picture(run, runs, rows, name), _table(run, runs, last)]
            if len(last) < len(rows):
                blocks.append(_table(run, runs, rows, folded=True))
    if not blocks:
        blocks.append(Missing("Neither speed nor memory was measured yet:", COMMAND))
    return Section("speed", "Speed and memory", blocks)


def _picture(run: Run, runs: Sequence[Run], rows: Sequence[Timed], name: str) -> Picture:
    """Time of a step and bytes of the cache, and throughput where there are several batches."""
    looks = looks_of(rows, styles(runs))
    panels = [step_panel(rows, looks), cache_panel(rows, looks)]
    if len({row.batch for row in rows}) > 1:
        panels.append(throughput_panel(rows, looks))
    return lines(
        slug(run, runs, name),
        [panel for panel in panels if panel.lines],
        text="Milliseconds of a decoding step and megabytes of cache against cached tokens.",
        caption=title_of(
            run, runs, "Medians of one interleaved run, bars: quartiles. DynamicCache and "
            "StaticCache are transformers' own, with sdpa."
        ),
    )  # fmt: skip


def _table(run: Run, runs: Sequence[Run], rows: Sequence[Timed], *, folded: bool = False) -> Table:
    body: list[Sequence[Cell]] = []
    for context, batch in dict.fromkeys((row.context, row.batch) for row in rows):
        body.append([Cell(f"{context:,.0f} cached tokens, batch {batch:.0f}")])
        body += [_cells(row) for row in rows if (row.context, row.batch) == (context, batch)]
    header = ("cache", "step ms", "speedup", "tokens/s", "first token ms", "cache MB", "peak MB")
    return Table(
        header=header,
        rows=body,
        caption=title_of(
            run, runs, "All contexts" if folded else "Decoding at the longest context"
        ),
        notes=() if folded else (NOTE,),
        folded=folded,
    )


def _cells(row: Timed) -> list[Cell]:
    def shown(value: float | None, unit: float = 1.0, places: int = 0) -> str:
        return "–" if value is None else f"{value / unit:,.{places}f}"

    low, high = row.speedup_low, row.speedup_high
    quartiles = "" if low is None or high is None else f"{low:.2f}–{high:.2f}"
    return [
        Cell(row.label),
        Cell(shown(row.step_ms, places=1)),
        Cell(shown(row.speedup, places=2), quartiles),
        Cell(shown(row.tokens_per_second, places=1)),
        Cell(shown(row.first_token_ms)),
        Cell(shown(row.cache_bytes, MEGABYTE, 1)),
        Cell(shown(row.peak_bytes, MEGABYTE)),
    ]
