"""Quality against bytes: the perplexity of every budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from matkv.artifact.setting import Setting
from matkv.report.page import Block, Cell, Missing, Table
from matkv.report.pictures.figures import Axis, Line, Panel, lines
from matkv.report.pictures.theme import Picture
from matkv.report.rows import Measured, Source
from matkv.report.runs import Run, amount, line_name, percent, series

PANELS = 4
# Beyond so many times the full cache's perplexity a model talks nonsense, more or less of it.
CEILING = 20
CUT = f"Perplexities beyond {CEILING} times the full cache's are cut off; the tables have them."
HELD = (
    "Kept is what a further token costs in the layers that grow with the context; held is all that "
    "the cache holds after a window of text, of what the full one does."
)
COMMAND = "matkv evaluate RUN --budget 0.75 --budget 0.5 --budget 0.25"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The rows of one run used in one way, by falling budget."""

    run: Run
    way: Setting
    label: str
    rows: Sequence[Measured]


def sources(runs: Sequence[Run]) -> list[Source]:
    """Every text, the one with the most rows first."""
    rows = [row for run in runs for row in run.read(Measured) if row.budget is not None]
    counts = Counter(row.source for row in rows)
    return sorted(counts, key=lambda source: (-counts[source], str(source)))


def curves(runs: Sequence[Run], source: Source) -> list[Curve]:
    """A curve for every run and every way it was used on one text."""
    found = []
    for run in runs:
        ways: dict[Setting, list[Measured]] = {}
        for one in series([row for row in run.read(Measured) if row.source == source]):
            if one.budget is not None:
                ways.setdefault(one.way, []).extend(one.rows)
        for way in sorted(ways, key=lambda way: (way.uniform, way.sink, way.recent)):
            label = line_name(run, runs, way)
            found.append(Curve(run=run, way=way, label=label, rows=ways[way]))
    return found


def full_row(runs: Sequence[Run], source: Source) -> Measured | None:
    """The full cache's row on a text: the same in every run, as the model is."""
    rows = (row for run in runs for row in run.read(Measured))
    return next((row for row in rows if row.budget is None and row.source == source), None)


def quality_blocks(runs: Sequence[Run]) -> list[Block]:
    """Perplexity against bytes: a panel and a table for every text."""
    found = sources(runs)
    if not found:
        return [Missing("No perplexity was measured of these bases yet:", COMMAND)]
    tables = [_table(runs, one, folded=index > 0) for index, one in enumerate(found)]
    return [_picture(runs, found[:PANELS]), *tables]


def readable(values: Sequence[float], full: float | None) -> tuple[float, float] | None:
    """The span of perplexities to draw where some are so high that the others would look alike."""
    if full is None or max(values, default=full) <= CEILING * full:
        return None
    return 0.75 * min(*values, full), CEILING * full


def perplexity_panel(
    title: str, x: Axis, shown: Sequence[Line], full_cache: Measured | float | None
) -> Panel:
    """Perplexity against bytes, with the full cache's as a level."""
    full = full_cache.perplexity if isinstance(full_cache, Measured) else full_cache
    values = [value for line in shown for _, value in line.points]
    return Panel(
        title=title,
        x=x,
        y=Axis(label="perplexity", log=10, span=readable(values, full)),
        lines=[line for line in shown if line.points],
        levels=[] if full is None else [(full, f"full cache {amount(full)}")],
    )


def _picture(runs: Sequence[Run], shown: Sequence[Source]) -> Picture:
    labels = list(dict.fromkeys(c.label for source in shown for c in curves(runs, source)))
    panels = []
    for source in shown:
        full = full_row(runs, source)
        drawn = [
            Line(
                label=curve.label,
                points=[(row.share, row.perplexity) for row in curve.rows],
                bounds=[row.spread for row in curve.rows],
                style=labels.index(curve.label),
            )
            for curve in curves(runs, source)
        ]
        x = Axis(label="cache bytes kept", percent=True)
        panels.append(perplexity_panel(str(source), x, drawn, full))
    return lines(
        "quality",
        panels,
        text="Perplexity against the share of cache bytes kept, a line for each run.",
        caption="Lower is better; further left is smaller. Bars: one standard error over "
        "windows, which all budgets share: they lie far nearer to one another than bars say. "
        + (CUT if any(panel.y.span for panel in panels) else ""),
    )


def _table(runs: Sequence[Run], source: Source, *, folded: bool) -> Table:
    its = curves(runs, source)
    rows: list[Sequence[Cell]] = []
    full = full_row(runs, source)
    if full is not None:
        rows.append(_cells(full, full))
    for curve in its:
        if len(its) > 1:
            rows.append([Cell(curve.label)])
        rows += [_cells(row, full) for row in curve.rows]
    return Table(
        header=("budget", "kept", "held", "bytes a token", "perplexity", "× full cache"),
        rows=rows,
        caption=f"Perplexity on {source}",
        notes=() if folded else (HELD,),
        folded=folded,
    )


def perplexity_cell(row: Measured, *, best: bool = False) -> Cell:
    """A perplexity with its standard error."""
    error = "" if row.stderr is None else f"±{amount(row.perplexity * row.stderr)}"
    return Cell(amount(row.perplexity), error, best)


def _cells(row: Measured, full: Measured | None) -> list[Cell]:
    size = row.bytes_per_token
    return [
        Cell(percent(row.budget)),
        Cell(percent(row.share)),
        Cell("" if row.held is None else f"{row.held:.1%}"),
        Cell("" if size is None else f"{size:,.0f}"),
        perplexity_cell(row),
        Cell("" if full is None else f"{row.perplexity / full.perplexity:,.3f}"),
    ]
