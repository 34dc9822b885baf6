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
Looks = Mapping[str, int | None]  # the style of every cache by its label


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
    styles: dict[float | None, int | None] = {None: None}
    styles |= {budget: index for index, budget in enumerate(sorted(budgets, reverse=True))}
    looks = looks_of(rows, styles)
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


def step_panel(rows: Sequence[Timed], looks: Looks) -> Panel:
    """Time of a step against context at the smallest batch, with its quartiles."""
    shown = _smallest_batch(rows)
    return Panel(
        title=f"decoding step, batch {shown[0].batch:.0f}",
        x=Axis(label="cached tokens", log=2),
        y=Axis(label="milliseconds", log=10),
        lines=_lines(shown, "step_ms", looks),
    )


def cache_panel(rows: Sequence[Timed], looks: Looks) -> Panel:
    """Bytes of the cache against context at the smallest batch."""
    shown = _smallest_batch(rows)
    return Panel(
        title=f"cache, batch {shown[0].batch:.0f}",
        x=Axis(label="cached tokens", log=2),
        y=Axis(label="megabytes", log=10),
        lines=_lines(shown, "cache_bytes", looks, unit=MEGABYTE),
    )


def throughput_panel(rows: Sequence[Timed], looks: Looks) -> Panel:
    """Tokens a second against batch at the longest context."""
    context = max((row.context for row in rows), default=0)
    at = [row for row in rows if row.context == context]
    return Panel(
        title=f"throughput at {context:,.0f} cached tokens",
        x=Axis(label="batch", log=2),
        y=Axis(label="tokens a second", zero=True),
        lines=_lines(at, "tokens_per_second", looks, x="batch"),
    )


def largest_context(rows: Sequence[Timed], looks: Looks, memory: int) -> Picture:
    """Bars: what weights leave of a memory, over the bytes of a token at the longest context."""
    shown, longest = _smallest_batch(rows), max(row.context for row in rows)
    tokens = {
        row.label: max(0.0, memory - row.weight_bytes) / row.cache_bytes * longest
        for row in shown
        if row.context == longest and row.weight_bytes is not None and row.cache_bytes
    }

    def draw(canvas: Canvas) -> None:
        axes = canvas.figure.subplots()
        frame(canvas, axes)
        axes.grid(False)
        colors = [line_color(canvas, looks[label]) for label in tokens]
        bars = axes.barh(list(tokens), list(tokens.values()), color=colors)
        axes.bar_label(bars, fmt="{:,.0f}", padding=4, fontsize=SMALL, color=canvas.color("ink"))
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xticks([])
        axes.set_xlabel(f"cached tokens in {memory / 1e9:,.3g} GB, batch {shown[0].batch:.0f}")

    height = 60 + 36 * len(tokens)
    text = "The longest context that fits the memory, a bar for each cache."
    return picture("largest_context", draw, wide=(WIDE, height), narrow=(NARROW, height), text=text)


def looks_of(
    rows: Sequence[Timed], styles: Mapping[float | None, int | None]
) -> dict[str, int | None]:
    """The style of every cache; those of full ones beyond the first come after all budgets'."""
    full = list(dict.fromkeys(row.label for row in rows if row.budget is None))
    spare = {label: len(styles) - 1 + index for index, label in enumerate(full[1:])}
    return {row.label: spare.get(row.label, styles[row.budget]) for row in rows}


def _smallest_batch(rows: Sequence[Timed]) -> list[Timed]:
    batch = min(row.batch for row in rows)
    return [row for row in rows if row.batch == batch]


def _lines(
    rows: Sequence[Timed], name: str, looks: Looks, *, x: str = "context", unit: float = 1.0
) -> list[Line]:
    drawn = []
    for label, style in looks.items():
        own = [row for row in rows if row.label == label and getattr(row, name) is not None]
        drawn.append(
            Line(
                label=label,
                points=[(getattr(row, x), getattr(row, name) / unit) for row in own],
                bounds=[row.quartiles for row in own] if name == "step_ms" else (),
                style=style,
                dash=max((1 if row.budget is None else row.dash for row in own), default=0),
            )
        )
    return [line for line in drawn if line.points]
