"""Lines in panels. What they show comes from the sections."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matkv.report.pictures.theme import MARKERS, NARROW, SERIES, WIDE, Canvas, Picture, picture

Point = tuple[float, float]
FONT, SMALL = 11.5, 10.5


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of points (x, y); `bounds` are (low, high) of every point, `labels` stand beside them.

    `style` numbers colour and marker; None is the reference, grey and dashed. `plain` draws no
    markers, `strong` a thicker line.
    """

    label: str
    points: Sequence[Point]
    style: int | None
    bounds: Sequence[Point] = ()
    labels: Sequence[str] = ()
    plain: bool = False
    dashed: bool = False
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis: its label, whether it is logarithmic, and its ticks where those are fixed.

    `zero` starts it there, `top` ends it; of what is outside `span` nothing is drawn.
    """

    label: str
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    percent: bool = False
    zero: bool = False
    top: float | None = None
    span: Point | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One coordinate system with its lines, and levels that go all the way across."""

    x: Axis
    y: Axis
    lines: Sequence[Line]
    title: str = ""
    levels: Sequence[tuple[float, str]] = ()


def budget_ticks(budgets: Sequence[float]) -> list[tuple[float, str]]:
    """Budgets in percent."""
    return [(budget, f"{100 * budget:g}%") for budget in sorted(set(budgets))]


def context_ticks(contexts: Sequence[float]) -> list[tuple[float, str]]:
    """Powers of two as 512, 1k, 2k; other numbers as they are."""
    return [
        (n, f"{n / 1024:g}k" if n >= 1024 and n % 512 == 0 else f"{n:g}")
        for n in sorted(set(contexts))
    ]


def lines(name: str, panels: Sequence[Panel], *, text: str, caption: str = "") -> Picture:
    """Panels side by side, one below the other where the page is narrow, under one legend."""
    labels = _legend(panels)
    rows = math.ceil(len(panels) / 2)
    legend = 24
    wide = 70 + legend * _legend_rows(labels, WIDE) + (330 if len(panels) == 1 else 300) * rows
    narrow = 50 + 20 * _legend_rows(labels, NARROW) + 250 * len(panels)

    def draw(canvas: Canvas) -> None:
        columns = 1 if canvas.narrow else min(2, len(panels))
        grid = canvas.figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False)
        cells = list(grid.flat)
        for axes, panel in zip(cells, panels, strict=False):
            draw_panel(canvas, axes, panel, columns)
        for axes in cells[len(panels) :]:
            axes.set_axis_off()
        _draw_legend(canvas, cells[: len(panels)], labels)

    return picture(
        name, draw, wide=(WIDE, wide), narrow=(NARROW, narrow), text=text, caption=caption
    )


def _legend(panels: Sequence[Panel]) -> list[str]:
    return list(dict.fromkeys(line.label for panel in panels for line in panel.lines))


def _legend_columns(labels: Sequence[str], width: int) -> int:
    widest = max((len(label) for label in labels), default=1) * 6.6 + 46
    return max(1, min(len(labels), int((width - 20) / widest)))


def _legend_rows(labels: Sequence[str], width: int) -> int:
    return math.ceil(len(labels) / _legend_columns(labels, width)) if len(labels) > 1 else 0


def _draw_legend(canvas: Canvas, cells: Sequence[Any], labels: Sequence[str]) -> None:
    handles = {
        label: handle
        for axes in cells
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if len(labels) < 2:
        return
    columns = _legend_columns(labels, NARROW if canvas.narrow else WIDE)
    canvas.figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside upper left",
        ncols=columns,
        fontsize=FONT,
        labelcolor=canvas.color("ink"),
        borderpad=0.2,
        columnspacing=1.6,
    )


def draw_panel(canvas: Canvas, axes: Any, panel: Panel, beside: int = 1) -> None:
    """Draw a panel, one of `beside` in its row."""
    frame(canvas, axes)
    for line in panel.lines:
        _line(canvas, axes, line)
    for level, label in panel.levels:
        axes.axhline(level, color=canvas.color("muted"), ls=(0, (4, 3)), lw=1.1, zorder=1)
        axes.annotate(
            label, (1, level), (0, -4), xycoords=("axes fraction", "data"), fontsize=SMALL,
            textcoords="offset points", ha="right", va="top", color=canvas.color("muted"),
        )  # fmt: skip
    axes.margins(x=0.05, y=0.1)
    if panel.y.zero:
        axes.set_ylim(bottom=0)
    if panel.y.top is not None:
        axes.set_ylim(top=panel.y.top)
    if panel.y.span is not None:
        axes.set(yscale="log" if panel.y.log else "linear", ylim=panel.y.span)
        for drawn in axes.lines:
            drawn.set_clip_on(True)
    crowded = canvas.narrow or beside > 1
    _axis(axes.xaxis, axes.set_xscale, axes.get_xlim, panel.x, 0.14 if crowded else 0.07)
    _axis(axes.yaxis, axes.set_yscale, axes.get_ylim, panel.y, 0.08)
    if panel.title:
        room = 44 if canvas.narrow else 120 // beside
        title = "\n".join(textwrap.wrap(panel.title, room))
        look = {"color": canvas.color("ink"), "fontweight": "bold"}
        axes.set_title(title, fontsize=FONT, loc="left", **look)


def frame(canvas: Canvas, axes: Any) -> None:
    """Axes in the theme's colours."""
    axes.set_facecolor("none")
    axes.grid(color=canvas.color("grid"), lw=0.8)
    for spine in axes.spines.values():
        spine.set_color(canvas.color("muted"))
        spine.set_linewidth(0.9)
    muted = canvas.color("muted")
    axes.tick_params(color=muted, labelcolor=muted, labelsize=SMALL, length=3)
    axes.xaxis.label.set(color=muted, size=SMALL)
    axes.yaxis.label.set(color=muted, size=SMALL)


def _line(canvas: Canvas, axes: Any, line: Line) -> None:
    order = sorted(range(len(line.points)), key=lambda index: line.points[index])
    x, y = ([line.points[index][axis] for index in order] for axis in (0, 1))
    look = _look(canvas, line)
    axes.plot(x, y, label=line.label, **look)
    if line.bounds:
        low, high = ([line.bounds[index][end] for index in order] for end in (0, 1))
        axes.vlines(x, low, high, color=look["color"], lw=1.2, alpha=0.7)
    for index, label in zip(order, (line.labels[i] for i in order if line.labels), strict=False):
        axes.annotate(
            label, line.points[index], (0, 8), textcoords="offset points", ha="center",
            fontsize=SMALL - 1, color=look["color"],
        )  # fmt: skip


def _look(canvas: Canvas, line: Line) -> dict[str, Any]:
    """Colour, marker and dashes of a line."""
    look: dict[str, Any] = {"clip_on": False, "zorder": 3}
    if line.style is None:
        return look | {"color": canvas.color("muted"), "marker": "_", "linestyle": (0, (4, 3))}
    color = canvas.color(SERIES[line.style % len(SERIES)])
    # Where the colours begin again the markers go on from another one.
    turn = line.style + 3 * (line.style // len(SERIES))
    marker = "" if line.plain else MARKERS[turn % len(MARKERS)]
    dash = (0, (5, 2)) if line.dashed else "-"
    width = 2.8 if line.strong else 1.8
    return look | {"color": color, "marker": marker, "linestyle": dash, "lw": width}


def _axis(axis: Any, set_scale: Any, limits: Any, spec: Axis, gap: float) -> None:
    """Scale, ticks at least `gap` of the axis apart, and label."""
    from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

    if spec.log:
        set_scale("log")
    axis.set_label_text(spec.label)
    low, high = limits()
    if spec.ticks is not None:
        _set_ticks(axis, _spaced(spec.ticks, low, high, gap, log=spec.log))
    elif spec.log:
        _set_ticks(axis, _log_ticks(low, high))
    else:
        axis.set_major_locator(MaxNLocator(min(8, int(0.8 / gap)), steps=(1, 2, 2.5, 5, 10)))
        plain = PercentFormatter(1, decimals=0) if spec.percent else _plain
        axis.set_major_formatter(plain)
    axis.set_minor_locator(NullLocator())


def _plain(value: float, _: int) -> str:
    return f"{value:,.10g}"


def _set_ticks(axis: Any, ticks: Sequence[tuple[float, str]]) -> None:
    axis.set_ticks([value for value, _ in ticks], labels=[label for _, label in ticks])


def _spaced(
    ticks: Sequence[tuple[float, str]], low: float, high: float, gap: float, *, log: bool
) -> list[tuple[float, str]]:
    """The largest tick, and from there down those that keep their distance."""

    def place(value: float) -> float:
        if log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    kept: list[tuple[float, str]] = []
    for value, label in sorted(ticks, reverse=True):
        if not kept or place(kept[-1][0]) - place(value) >= gap:
            kept.append((value, label))
    return kept


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers of a logarithmic axis: as few as give four, whatever its length."""
    for parts in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    ):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [part * 10.0**power for power in powers for part in parts]
        found = [value for value in values if low <= value <= high]
        if len(found) >= 4:
            return [(value, f"{value:,.10g}") for value in found]
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9)))
    step *= next(part for part in (0.1, 0.2, 0.5, 1, 2, 5) if (high - low) / (part * step) <= 6)
    count = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(index * step, f"{index * step:,.10g}") for index in count]
