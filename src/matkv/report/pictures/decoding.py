"""Pictures of decoding steps: time, bytes, throughput, and the context that fits a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matkv.errors import MatkvError
from matkv.report.pictures.figures import SMALL, Axis, Line, Panel, frame, line_color, lines
from matkv.report.pictures.theme import NARROW, WIDE, Canvas, Picture, picture, save
from matkv.report.rows import Timed, read

MEGABYTE = 1e6
Styles = Mapping[float | None, int | None]


def save_benchmark(
    records: Sequence[dict[str, Any]], directory: str | Path, *, memory: int | None = None
) -> list[Path]:
    """Write latency.png, throughput.png and largest_context.png; returns their paths.

    Throughput is of the batches whose weights and cache fit `memory` bytes. None stands for what
    the weights and the largest measured full cache take.

    Raises:
        MatkvError: matplotlib is not installed, or there are no rows.
    """
    rows = read(Timed, records)
    if not rows:
        raise MatkvError("no rows to plot: the benchmark measured nothing")
    budgets = {row.budget for row in rows if row.budget is not None}
    looks = {None: None} | {b: index for index, b in enumerate(sorted(budgets, reverse=True))}
    sizes = [(size, row) for row in rows if (size := row.resident_bytes) is not None]
    if memory is None:
        memory = int(max((size for size, row in sizes if row.budget is None), default=0))
    fitting = [row for size, row in sizes if size <= memory]
    drawn = [
        lines("latency", [step_panel(rows, looks)], text="Time of a decoding step by context."),
        lines("throughput", [throughput_panel(fitting, looks)], text="Tokens a second by batch."),
        largest_context(rows, looks, memory),
    ]
    return [save(one, Path(directory) / f"{one.name}.png") for one in drawn]


def step_panel(rows: Sequence[Timed], looks: Styles) -> Panel:
    """Time of a step against context at the smallest batch, with its quartiles."""
    shown = _smallest_batch(rows)
    return Panel(
        title=f"decoding step, batch {shown[0].batch:.0f}",
        x=Axis(label="cached tokens", log=2),
        y=Axis(label="milliseconds", log=10),
        lines=_lines(shown, "step_ms", looks),
    )


def cache_panel(rows: Sequence[Timed], looks: Styles) -> Panel:
    """Bytes of the cache against context at the smallest batch."""
    shown = _smallest_batch(rows)
    return Panel(
        title=f"cache, batch {shown[0].batch:.0f}",
        x=Axis(label="cached tokens", log=2),
        y=Axis(label="megabytes", log=10),
        lines=_lines(shown, "cache_bytes", looks, unit=MEGABYTE),
    )


def throughput_panel(rows: Sequence[Timed], looks: Styles) -> Panel:
    """Tokens a second against batch at the longest context."""
    context = max((row.context for row in rows), default=0)
    at = [row for row in rows if row.context == context]
    return Panel(
        title=f"throughput at {context:,.0f} cached tokens",
        x=Axis(label="batch", log=2),
        y=Axis(label="tokens a second", zero=True),
        lines=_lines(at, "tokens_per_second", looks, x="batch"),
    )


def largest_context(rows: Sequence[Timed], looks: Styles, memory: int) -> Picture:
    """Bars: what weights leave of a memory, over the bytes of a token at the longest context."""
    shown, longest = _smallest_batch(rows), max(row.context for row in rows)
    names = caches(rows, looks)
    tokens = {
        row.label: max(0.0, memory - row.weight_bytes) / row.cache_bytes * longest
        for row in shown
        if row.context == longest and row.weight_bytes is not None and row.cache_bytes
    }

    def draw(canvas: Canvas) -> None:
        axes = canvas.figure.subplots()
        frame(canvas, axes)
        axes.grid(False)
        colors = [line_color(canvas, names[label]) for label in tokens]
        bars = axes.barh(list(tokens), list(tokens.values()), color=colors)
        axes.bar_label(bars, fmt="{:,.0f}", padding=4, fontsize=SMALL, color=canvas.color("ink"))
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xticks([])
        axes.set_xlabel(f"cached tokens in {memory / 1e9:,.3g} GB, batch {shown[0].batch:.0f}")

    height = 60 + 36 * len(tokens)
    text = "The longest context that fits the memory, a bar for each cache."
    return picture("largest_context", draw, wide=(WIDE, height), narrow=(NARROW, height), text=text)


def caches(rows: Sequence[Timed], looks: Styles) -> dict[str, int | None]:
    """The style of every cache by its label: full ones beyond the first come after all budgets."""
    found: dict[str, int | None] = {}
    spare = len(looks) - 1
    for row in rows:
        if row.label in found:
            continue
        if row.budget is None and None in found.values():
            found[row.label], spare = spare, spare + 1
        else:
            found[row.label] = looks[row.budget]
    return found


def _smallest_batch(rows: Sequence[Timed]) -> list[Timed]:
    batch = min(row.batch for row in rows)
    return [row for row in rows if row.batch == batch]


def _lines(
    rows: Sequence[Timed], name: str, looks: Styles, *, x: str = "context", unit: float = 1.0
) -> list[Line]:
    drawn = []
    for label, style in caches(rows, looks).items():
        own = [row for row in rows if row.label == label and getattr(row, name) is not None]
        drawn.append(
            Line(
                label=label,
                points=[(getattr(row, x), getattr(row, name) / unit) for row in own],
                bounds=[row.quartiles for row in own] if name == "step_ms" else (),
                style=style,
                dashed=any(row.budget is None or str(row.way) for row in own),
            )
        )
    return [line for line in drawn if line.points]
