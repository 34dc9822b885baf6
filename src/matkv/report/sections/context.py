"""Long context: retrieval by context and budget, and perplexity by position."""

from __future__ import annotations

from collections.abc import Sequence

from matkv.artifact.records import Record
from matkv.report.page import Block, Cell, Missing, Section, Table
from matkv.report.pictures.figures import Axis, Line, Panel, Point, context_ticks, lines
from matkv.report.runs import Run, Series, having, number, series, slug, styles, title_of, way_of
from matkv.report.sections.quality import PANELS, Source, source_of

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


def _mean(rows: Sequence[Record], name: str) -> float | None:
    """Mean over depths, each counted with its number of trials."""
    pairs = [(number(row, name), number(row, "n") or 1.0) for row in rows]
    found = [(value, count) for value, count in pairs if value is not None]
    total = sum(count for _, count in found)
    return sum(value * count for value, count in found) / total if found else None


def _error(rows: Sequence[Record]) -> float | None:
    """Standard error of the mean over depths."""
    count = sum(number(row, "n") or 1.0 for row in rows)
    errors = [(number(row, "stderr"), number(row, "n") or 1.0) for row in rows]
    if any(error is None for error, _ in errors) or not errors:
        return None
    return float(sum(((error or 0.0) * n) ** 2 for error, n in errors) ** 0.5 / count)


def _needle(run: Run, runs: Sequence[Run]) -> list[Block]:
    rows = _largest(having(run.rows["needle"], "context", "accuracy"))
    if not rows:
        return []
    tests, looks = sorted(set(map(_test, rows))), styles(runs)
    panels = [_needle_panel([r for r in rows if _test(r) == test], test, looks) for test in tests]
    chart = lines(
        slug(run, runs, "needle"),
        panels,
        text="Accuracy of retrieval against context length, a line for each budget.",
        caption=title_of(run, runs, "Mean over depths; bars: one standard error."),
    )
    return [chart, *(_needle_table(run, runs, rows, test) for test in tests)]


def _test(row: Record) -> str:
    """The test, and what hides its fact."""
    return ", ".join(str(row[name]) for name in ("test", "filler") if row.get(name)) or "needle"


def _largest(rows: Sequence[Record]) -> list[Record]:
    """Of rows that differ by nothing but the number of samples, the one with the most."""
    found: dict[tuple[object, ...], Record] = {}
    for row in sorted(rows, key=lambda row: number(row, "n") or 0.0):
        place = (number(row, name) for name in ("budget", "context", "depth"))
        found[(_test(row), way_of(row), row.get("dtype"), *place)] = row
    return list(found.values())


def _needle_panel(
    rows: Sequence[Record], test: str, looks: dict[float | None, int | None]
) -> Panel:
    contexts = sorted({number(row, "context") or 0.0 for row in rows})
    drawn = []
    for one in series(rows):
        points, bounds = [], []
        for context in contexts:
            at = _at(one.rows, context)
            value, error = _mean(at, "accuracy"), _error(at) or 0.0
            if value is not None:
                points.append((context, value))
                bounds.append((max(0.0, value - error), min(1.0, value + error)))
        drawn.append(_drawn(one, points, looks, bounds))
    return Panel(
        title=test,
        x=Axis(label="tokens of context", log=True, ticks=context_ticks(contexts)),
        y=Axis(label="accuracy", percent=True, zero=True, top=1),
        lines=drawn,
    )


def _drawn(
    one: Series,
    points: Sequence[Point],
    looks: dict[float | None, int | None],
    bounds: Sequence[Point] = (),
) -> Line:
    return Line(
        label=str(one),
        points=points,
        bounds=bounds,
        style=looks[one.budget],
        dashed=bool(str(one.way)),
    )


def _at(rows: Sequence[Record], context: float) -> list[Record]:
    return [row for row in rows if number(row, "context") == context]


def _needle_table(run: Run, runs: Sequence[Run], rows: Sequence[Record], test: str) -> Table:
    own = [row for row in rows if _test(row) == test]
    contexts = sorted({number(row, "context") or 0.0 for row in own})
    body = []
    for one in series(own):
        cells = [Cell(str(one))]
        for context in contexts:
            at = _at(one.rows, context)
            value, error, loss = _mean(at, "accuracy"), _error(at), _mean(at, "answer_loss")
            shown = "–" if value is None else f"{value:.0%}"
            small = "" if error is None else f"±{100 * error:.0f}"
            small += "" if loss is None else f" · {loss:.2f} nats"
            cells.append(Cell(shown, small.strip(" ·")))
        body.append(cells)
    return Table(
        header=("budget", *(f"{context:,.0f} tokens" for context in contexts)),
        rows=body,
        caption=title_of(run, runs, f"{test}: accuracy, its standard error, loss of the answer"),
        folded=True,
    )


def _positions(run: Run, runs: Sequence[Run]) -> list[Block]:
    rows = having(run.rows["positions"], "start", "end", "perplexity")
    if not rows:
        return []
    looks = styles(runs)
    found: dict[Source, list[Record]] = {}
    for row in rows:
        found.setdefault(source_of(row), []).append(row)
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


def _positions_panel(
    rows: Sequence[Record], title: str, looks: dict[float | None, int | None]
) -> Panel:
    drawn = []
    for one in series(rows):
        points = [(_middle(row), number(row, "perplexity") or 0.0) for row in one.rows]
        drawn.append(_drawn(one, points, looks))
    ends = {number(row, "end") or 1.0 for row in rows}
    return Panel(
        title=title,
        x=Axis(label="position of the token", log=True, ticks=context_ticks(sorted(ends))),
        y=Axis(label="perplexity", log=True),
        lines=drawn,
    )


def _middle(row: Record) -> float:
    """The geometric middle of a span of positions: the axis is logarithmic."""
    start, end = number(row, "start") or 0.0, number(row, "end") or 1.0
    return float(((start + 1) * max(end, start + 1)) ** 0.5)
