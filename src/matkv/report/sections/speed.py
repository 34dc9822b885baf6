"""Speed and memory of a decoding step, from the rows of `matkv benchmark`."""

from __future__ import annotations

from collections.abc import Sequence

from matkv.artifact.records import Record
from matkv.report.page import Block, Cell, Missing, Section, Table
from matkv.report.pictures.figures import Axis, Line, Panel, context_ticks, lines
from matkv.report.pictures.theme import Picture
from matkv.report.runs import Run, having, number, percent, slug, styles, title_of, way_of

COMMAND = "matkv benchmark RUN"
NOTE = (
    "Speedup: over DynamicCache, with quartiles of rounds that took turns. Peak: weights, cache "
    "and what a step takes on top."
)
MEGABYTE = 1e6
Styles = dict[float | None, int | None]


def speed_section(runs: Sequence[Run]) -> Section:
    """Time and bytes against context, and throughput where batches were measured."""
    blocks: list[Block] = []
    for run in runs:
        rows = having(run.rows["benchmark"], "context", "batch", "step_ms")
        for index, its in enumerate(_by_dtype(rows)):
            name = "speed" if index == 0 else f"speed-{its[0].get('dtype')}"
            longest = max(number(row, "context") or 0.0 for row in its)
            last = [row for row in its if number(row, "context") == longest]
            blocks += [_picture(run, runs, its, name), _table(run, runs, last)]
            if len(last) < len(its):
                blocks.append(_table(run, runs, its, folded=True))
    if not blocks:
        blocks.append(Missing("Neither speed nor memory was measured yet:", COMMAND))
    return Section("speed", "Speed and memory", blocks)


def _by_dtype(rows: Sequence[Record]) -> list[list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(str(row.get("dtype") or ""), []).append(row)
    return sorted(found.values(), key=len, reverse=True)


def _names(rows: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(_name(row) for row in rows))


def _name(row: Record) -> str:
    name, budget, way = str(row.get("name") or ""), number(row, "budget"), str(way_of(row))
    return name if budget is None else f"matkv {percent(budget)}" + (f", {way}" if way else "")


def _picture(run: Run, runs: Sequence[Run], rows: Sequence[Record], name: str) -> Picture:
    """Time of a step and bytes of the cache against context at the smallest batch."""
    batch = min(number(row, "batch") or 1.0 for row in rows)
    shown, looks = [row for row in rows if number(row, "batch") == batch], styles(runs)
    contexts = [number(row, "context") or 0.0 for row in shown]
    x = Axis(label="cached tokens", log=True, ticks=context_ticks(contexts))
    panels = [
        Panel(
            title=f"decoding step, batch {batch:.0f}",
            x=x,
            y=Axis(label="milliseconds", log=True),
            lines=_lines(shown, "step_ms", 1.0, looks, bounds=True),
        ),
        Panel(
            title=f"cache, batch {batch:.0f}",
            x=x,
            y=Axis(label="megabytes", log=True),
            lines=_lines(having(shown, "cache_bytes"), "cache_bytes", MEGABYTE, looks),
        ),
    ]
    batches = sorted({number(row, "batch") or 1.0 for row in rows})
    if len(batches) > 1:
        panels.append(_throughput(rows, looks))
    return lines(
        slug(run, runs, name),
        [panel for panel in panels if panel.lines],
        text="Milliseconds of a decoding step and megabytes of cache against cached tokens.",
        caption=title_of(
            run, runs, "Medians of one interleaved run, bars: quartiles. DynamicCache and "
            "StaticCache are transformers' own, with sdpa."
        ),
    )  # fmt: skip


def _throughput(rows: Sequence[Record], looks: Styles) -> Panel:
    context = max(number(row, "context") or 0.0 for row in rows)
    at = [row for row in rows if number(row, "context") == context]
    batches = sorted({number(row, "batch") or 1.0 for row in at})
    return Panel(
        title=f"throughput at {context:,.0f} cached tokens",
        x=Axis(label="batch", log=True, ticks=[(batch, f"{batch:g}") for batch in batches]),
        y=Axis(label="tokens a second", zero=True),
        lines=_lines(having(at, "tokens_per_second"), "tokens_per_second", 1.0, looks, x="batch"),
    )


def _lines(
    rows: Sequence[Record],
    name: str,
    unit: float,
    looks: Styles,
    *,
    x: str = "context",
    bounds: bool = False,
) -> list[Line]:
    drawn, full = [], 0
    for label in _names(rows):
        own = [row for row in rows if _name(row) == label]
        budget = number(own[0], "budget")
        # The second full cache needs a look of its own; budgets hardly number that many.
        style = looks.get(budget)
        if budget is None:
            style, full = (None if full == 0 else 6), full + 1
        ends = having(own, f"{name}_low", f"{name}_high") if bounds else []
        spread = [
            ((number(row, f"{name}_low") or 0.0), (number(row, f"{name}_high") or 0.0))
            for row in own
        ]
        drawn.append(
            Line(
                label=label,
                points=[(number(row, x) or 0.0, (number(row, name) or 0.0) / unit) for row in own],
                bounds=spread if bounds and len(ends) == len(own) else (),
                style=style,
                dashed=budget is None or bool(str(way_of(own[0]))),
            )
        )
    return drawn


def _table(run: Run, runs: Sequence[Run], rows: Sequence[Record], *, folded: bool = False) -> Table:
    body: list[Sequence[Cell]] = []
    situations = dict.fromkeys((number(row, "context"), number(row, "batch")) for row in rows)
    for context, batch in situations:
        body.append([Cell(f"{context:,.0f} cached tokens, batch {batch:.0f}")])
        for row in rows:
            if (number(row, "context"), number(row, "batch")) == (context, batch):
                body.append(_cells(row))
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


def _cells(row: Record) -> list[Cell]:
    def shown(name: str, unit: float = 1.0, places: int = 0) -> str:
        value = number(row, name)
        return "–" if value is None else f"{value / unit:,.{places}f}"

    low, high = number(row, "speedup_low"), number(row, "speedup_high")
    quartiles = "" if low is None or high is None else f"{low:.2f}–{high:.2f}"
    return [
        Cell(_name(row)),
        Cell(shown("step_ms", 1.0, 1)),
        Cell(shown("speedup", 1.0, 2), quartiles),
        Cell(shown("tokens_per_second", 1.0, 1)),
        Cell(shown("first_token_ms")),
        Cell(shown("cache_bytes", MEGABYTE, 1)),
        Cell(shown("peak_bytes", MEGABYTE)),
    ]
