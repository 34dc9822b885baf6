"""Quality against bytes: the perplexity of every budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from matkv.artifact.records import Record
from matkv.artifact.setting import Setting
from matkv.report.page import Block, Cell, Missing, Table
from matkv.report.pictures.figures import Axis, Line, Panel, budget_ticks, lines
from matkv.report.pictures.theme import Picture
from matkv.report.runs import Run, amount, having, line_name, number, percent, way_of, ways

PANELS = 4
# Beyond so many times the full cache's perplexity a model talks nonsense, more or less of it.
CEILING = 20
CUT = f"Perplexities beyond {CEILING} times the full cache's are cut off; the tables have them."
COMMAND = "matkv evaluate RUN --budget 0.75 --budget 0.5 --budget 0.25"


@dataclass(frozen=True)
class Source:
    """What perplexity was measured on: a text in windows of so many tokens, in one dtype."""

    text: str
    window_tokens: int | None = None
    dtype: str = ""
    digest: str = ""

    def __str__(self) -> str:
        length = "" if self.window_tokens is None else f"{self.window_tokens:,}-token windows"
        return ", ".join(part for part in (self.text, length, self.dtype) if part)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The rows of one run used in one way, by falling budget."""

    run: Run
    way: Setting
    label: str
    rows: Sequence[Record]


def source_of(row: Record) -> Source:
    """What a row was measured on."""
    length = number(row, "window_tokens") or number(row, "length") or number(row, "context")
    dtype, digest = str(row.get("dtype") or ""), str(row.get("data") or row.get("text_digest"))
    return Source(text_name(row), None if length is None else int(length), dtype, digest)


def text_name(row: Record) -> str:
    """The text as readers know it: a file by its name, the packaged one by what it is."""
    text = str(row.get("text") or "held-out text")
    return "held-out articles" if text == "default" else text.rstrip("/").split("/")[-1]


def sources(runs: Sequence[Run]) -> list[Source]:
    """Every text, the one with the most rows first."""
    rows = [row for run in runs for row in having(run.rows["perplexity"], "perplexity", "budget")]
    counts = Counter(map(source_of, rows))
    return sorted(counts, key=lambda source: (-counts[source], str(source)))


def curves(runs: Sequence[Run], source: Source) -> list[Curve]:
    """A curve for every run and every way it was used on one text."""
    found = []
    for run in runs:
        rows = having(run.rows["perplexity"], "perplexity", "budget")
        rows = [row for row in rows if source_of(row) == source]
        rows.sort(key=lambda row: -(number(row, "budget") or 0.0))
        for way in ways(rows):
            own = [row for row in rows if way_of(row) == way]
            found.append(Curve(run=run, way=way, label=line_name(run, runs, way), rows=own))
    return found


def full_row(runs: Sequence[Run], source: Source) -> Record | None:
    """The full cache's row on a text: the same in every run, as the model is."""
    rows = [row for run in runs for row in having(run.rows["perplexity"], "perplexity")]
    fitting = (row for row in rows if row.get("budget") is None and source_of(row) == source)
    return next(fitting, None)


def quality_blocks(runs: Sequence[Run]) -> list[Block]:
    """Perplexity against bytes: a panel and a table for every text."""
    found = sources(runs)
    if not found:
        return [Missing("No perplexity was measured of these bases yet:", COMMAND)]
    tables = [_table(runs, one, folded=index > 0) for index, one in enumerate(found)]
    return [_picture(runs, found[:PANELS]), *tables]


def kept(row: Record) -> float:
    """The share of bytes that the ranks really keep."""
    share = number(row, "kept")
    return share if share is not None else number(row, "budget") or 0.0


def spread(row: Record) -> tuple[float, float]:
    """Perplexity one standard error of the mean log-likelihood to either side."""
    value, error = number(row, "perplexity") or 0.0, number(row, "stderr") or 0.0
    return value * (1 - error), value * (1 + error)


def readable(values: Sequence[float], full: float | None) -> tuple[float, float] | None:
    """The span of perplexities to draw where some are so high that the others would look alike."""
    if full is None or max(values, default=0.0) <= CEILING * full:
        return None
    return 0.75 * min(*values, full), CEILING * full


def _picture(runs: Sequence[Run], shown: Sequence[Source]) -> Picture:
    labels = list(dict.fromkeys(c.label for source in shown for c in curves(runs, source)))
    panels = []
    for source in shown:
        its = curves(runs, source)
        full = full_row(runs, source)
        value = None if full is None else number(full, "perplexity")
        values = [number(row, "perplexity") or 0.0 for curve in its for row in curve.rows]
        panels.append(
            Panel(
                title=str(source),
                x=Axis(label="cache bytes kept", ticks=budget_ticks([kept(r) for c in its
                                                                     for r in c.rows])),
                y=Axis(label="perplexity", log=True, span=readable(values, value)),
                lines=[
                    Line(
                        label=curve.label,
                        points=[(kept(r), number(r, "perplexity") or 0.0) for r in curve.rows],
                        bounds=[spread(row) for row in curve.rows],
                        style=labels.index(curve.label),
                    )
                    for curve in its
                ],
                levels=[] if value is None else [(value, f"full cache {value:.2f}")],
            )
        )  # fmt: skip
    return lines(
        "quality",
        panels,
        text="Perplexity against the share of cache bytes kept, a line for each run.",
        caption="Lower is better; further left is smaller. Bars: one standard error. "
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
        header=("budget", "kept", "bytes a token", "perplexity", "× full cache"),
        rows=rows,
        caption=f"Perplexity on {source}",
        folded=folded,
    )


def _cells(row: Record, full: Record | None) -> list[Cell]:
    value, size = number(row, "perplexity") or 0.0, number(row, "bytes_per_token")
    base = None if full is None else number(full, "perplexity")
    error = number(row, "stderr")
    return [
        Cell(percent(number(row, "budget"))),
        Cell(percent(kept(row)) if row.get("budget") is not None else "100%"),
        Cell("" if size is None else f"{size:,.0f}"),
        Cell(amount(value), "" if error is None else f"±{amount(value * error)}"),
        Cell("" if not base else f"{value / base:,.3f}"),
    ]
