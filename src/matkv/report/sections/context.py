"""Long context: retrieval by context and budget, and perplexity by position."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matkv.report.page import Block, Cell, Missing, Section, Table
from matkv.report.pictures.figures import Axis, Line, Panel, Point, lines
from matkv.report.rows import Needle, Position, RowT, Source
from matkv.report.runs import Run, Series, Styles, series, slug, styles, title_of
from matkv.report.sections.quality import PANELS

NEEDLE = "matkv evaluate RUN --budget 0.75 --budget 0.5 --long-context 2048"
POSITIONS = "matkv evaluate RUN --budget 0.75 --budget 0.5 --by-position"


def context_section(runs: Sequence[Run]) -> Section:
    """Retrieval and perplexity by position, of every run."""
    needles = [block for run in runs for block in _needle(run, runs)]
    positions = [block for run in runs for block in _positions(run, runs)]
    blocks: list[Block] = [
        *(needles or [Missing("Nothing was hidden in long contexts yet:", NEEDLE)]),
        *(positions or [Missing("No perplexity by position was measured yet:", POSITIONS)]),
    ]
    return Section("context", "Long context", blocks)


def _mean(rows: Sequence[Needle]) -> float:
    """Mean accuracy over depths, each counted with its number of trials."""
    return sum(row.accuracy * row.n for row in rows) / sum(row.n for row in rows)


def _loss(rows: Sequence[Needle]) -> float | None:
    """Mean loss of the answers where it was measured."""
    found = [(row.answer_loss, row.n) for row in rows if row.answer_loss is not None]
    return sum(loss * n for loss, n in found) / sum(n for _, n in found) if found else None


def _error(rows: Sequence[Needle]) -> float | None:
    """Standard error of the mean over depths; None where one is not known."""
    errors = [row.stderr * row.n for row in rows if row.stderr is not None]
    if len(errors) < len(rows):
        return None
    return math.hypot(*errors) / sum(row.n for row in rows)


def _needle(run: Run, runs: Sequence[Run]) -> list[Block]:
    rows = _largest(run.read(Needle))
    if not rows:
        return []
    tests, looks = sorted({row.title for row in rows}), styles(runs)
    panels = [_needle_panel([r for r in rows if r.title == test], test, looks) for test in tests]
    chart = lines(
        slug(run, runs, "needle"),
        panels,
        text="Accuracy of retrieval against context length, a line for each budget.",
        caption=title_of(run, runs, "Mean over depths; bars: one standard error."),
    )
    return [chart, *(_needle_table(run, runs, rows, test) for test in tests)]


def _largest(rows: Sequence[Needle]) -> list[Needle]:
    """Of rows that differ by nothing but the number of samples, the one with the most."""
    found: dict[tuple[object, ...], Needle] = {}
    for row in sorted(rows, key=lambda row: row.n):
        found[(row.title, row.budget, row.way, row.dtype, row.context, row.depth)] = row
    return list(found.values())


def _needle_panel(rows: Sequence[Needle], test: str, looks: Styles) -> Panel:
    drawn = []
    for one in series(rows):
        points, bounds = [], list[Point | None]()
        for context, at in _by_context(one.rows):
            value, error = _mean(at), _error(at)
            points.append((context, value))
            bounds.append(
                None if error is None else (max(0.0, value - error), min(1.0, value + error))
            )
        drawn.append(_drawn(one, points, looks, bounds))
    return Panel(
        title=test,
        x=Axis(label="tokens of context", log=2),
        y=Axis(label="accuracy", percent=True, zero=True, top=1),
        lines=drawn,
    )


def _by_context(rows: Sequence[Needle]) -> list[tuple[float, list[Needle]]]:
    contexts = sorted({row.context for row in rows})
    return [(one, [row for row in rows if row.context == one]) for one in contexts]


def _drawn(
    one: Series[RowT], points: Sequence[Point], looks: Styles, bounds: Sequence[Point | None] = ()
) -> Line:
    return Line(
        label=str(one),
        points=points,
        bounds=bounds,
        style=looks[one.budget],
        dash=one.rows[0].dash,
    )


def _needle_table(run: Run, runs: Sequence[Run], rows: Sequence[Needle], test: str) -> Table:
    own = [row for row in rows if row.title == test]
    contexts = [context for context, _ in _by_context(own)]
    body = []
    for one in series(own):
        measured = dict(_by_context(one.rows))
        body.append([Cell(str(one)), *(_needle_cell(measured.get(c, ())) for c in contexts)])
    return Table(
        header=("budget", *(f"{context:,.0f} tokens" for context in contexts)),
        rows=body,
        caption=title_of(run, runs, f"{test}: accuracy, its standard error, loss of the answer"),
        folded=True,
    )


def _needle_cell(rows: Sequence[Needle]) -> Cell:
    """Accuracy, and small beside it its error and the answers' loss."""
    if not rows:
        return Cell("–")
    error, loss = _error(rows), _loss(rows)
    small = ["" if error is None else f"±{100 * error:.0f}"]
    small.append("" if loss is None else f"{loss:.2f} nats")
    return Cell(f"{_mean(rows):.0%}", " · ".join(part for part in small if part))


def _positions(run: Run, runs: Sequence[Run]) -> list[Block]:
    found: dict[Source, list[Position]] = {}
    for row in run.read(Position):
        found.setdefault(row.source, []).append(row)
    if not found:
        return []
    looks = styles(runs)
    panels = [
        _positions_panel(its, str(source), looks)
        for source, its in sorted(found.items(), key=lambda item: (-len(item[1]), str(item[0])))
    ]
    return [
        lines(
            slug(run, runs, "positions"),
            panels[:PANELS],
            text="Perplexity against the position of the token, a line for each budget.",
            caption=title_of(run, runs, "Each point stands in the middle of its positions."),
        )
    ]


def _positions_panel(rows: Sequence[Position], title: str, looks: Styles) -> Panel:
    drawn = []
    for one in series(rows):
        points = [(_middle(row), row.perplexity) for row in one.rows]
        drawn.append(_drawn(one, points, looks))
    return Panel(
        title=title,
        x=Axis(label="position of the token", log=2),
        y=Axis(label="perplexity", log=10),
        lines=drawn,
    )


def _middle(row: Position) -> float:
    """The geometric middle of a span of positions: the axis is logarithmic."""
    return math.sqrt((row.start + 1) * max(row.end, row.start + 1))
