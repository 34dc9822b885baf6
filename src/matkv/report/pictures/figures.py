"""Lines in panels. What they show comes from the sections."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matkv.report.pictures.theme import MARKERS, NARROW, SERIES, WIDE, Canvas, Picture, picture

Point = tuple[float, float]
FONT, SMALL = 11.5, 10.5
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of points (x, y); `bounds` are (low, high) of every point, None where not known.

    `labels` stand beside the points where there is room. `style` numbers colour and marker; None is
    the reference, grey and dashed. `dash` numbers ways to draw the line, 0 for solid; `plain` draws
    no markers, `strong` a thicker line.
    """

    label: str
    points: Sequence[Point]
    style: int | None
    bounds: Sequence[Point | None] = ()
    labels: Sequence[str] = ()
    plain: bool = False
    dash: int = 0
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis: its label, the base of its logarithm, 0 for none, and its ticks if they are fixed.

    `zero` starts it there, `top` ends it; of what is outside `span` nothing is drawn.
    """

    label: str
    log: int = 0
    ticks: Sequence[tuple[float, str]] = ()
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
        place_labels(canvas)

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
    muted = canvas.color("muted")
    for level, label in panel.levels:
        axes.axhline(level, color=muted, ls=(0, (4, 3)), lw=1.1, zorder=1)
        anchor = {"xycoords": ("axes fraction", "data"), "fontsize": SMALL, "color": muted}
        axes.annotate(
            label,
            (1, level),
            (0, -10),
            textcoords="offset points",
            va="center",
            gid=LEVEL,
            **anchor,
        )
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
    _axis(axes.xaxis, axes.set_xscale, panel.x, 5 if crowded else 8)
    _axis(axes.yaxis, axes.set_yscale, panel.y, 6)
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
    look = _look(canvas, line)
    x, y = zip(*sorted(line.points), strict=True)
    axes.plot(x, y, label=line.label, **look)
    known = [(line.points[i][0], *bound) for i, bound in enumerate(line.bounds) if bound]
    if known:
        axes.vlines(*zip(*known, strict=True), color=look["color"], lw=1.2, alpha=0.7)
    for point, label in zip(line.points, line.labels, strict=False):
        axes.annotate(
            label, point, (0, 10), textcoords="offset points", ha="center", va="center",
            fontsize=SMALL - 1, color=look["color"], gid=LABEL,
        )  # fmt: skip


def line_color(canvas: Canvas, style: int | None) -> str:
    """The colour of a style; grey for the reference."""
    return canvas.color("muted" if style is None else SERIES[style % len(SERIES)])


def _look(canvas: Canvas, line: Line) -> dict[str, Any]:
    """Colour, marker and dashes of a line."""
    look: dict[str, Any] = {"clip_on": False, "zorder": 3, "color": line_color(canvas, line.style)}
    if line.style is None:
        return look | {"marker": "_", "linestyle": (0, (4, 3))}
    turn, place = divmod(line.style, len(SERIES))
    marker = "" if line.plain else MARKERS[place % len(MARKERS)]
    look |= {
        "marker": marker,
        "linestyle": DASHES[line.dash % len(DASHES)],
        "lw": 2.8 if line.strong else 1.8,
    }
    return look | {"markerfacecolor": "none"} if turn else look  # the colours begin again


def _axis(axis: Any, set_scale: Any, spec: Axis, most: int) -> None:
    """Scale, label, and ticks: `most` at most, round ones or a part of the fixed ones."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if spec.log:
        set_scale("log", base=spec.log)
    axis.set_label_text(spec.label)
    low, high = axis.get_view_interval()
    if spec.ticks:
        every = math.ceil(len(spec.ticks) / most)
        values, labels = zip(*spec.ticks[::-1][::every], strict=True)
        axis.set_ticks(values, labels=labels)
    elif spec.log and high / low > spec.log:
        decades = high / low > 100 * spec.log
        subs = (1.0,) if spec.log == 2 or decades else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(spec.log, subs=subs, numticks=most + 1))
    else:
        steps = (1, 1.25, 2.5, 5, 10) if spec.percent else (1, 2, 2.5, 5, 10)
        axis.set_major_locator(MaxNLocator(most, steps=steps))
    if not spec.ticks:
        shown = percents if spec.percent else powers if spec.log == 2 else _plain
        axis.set_major_formatter(FuncFormatter(shown))
    axis.set_minor_locator(NullLocator())


def percents(value: float, _: int = 0) -> str:
    """A share as readers write it."""
    return f"{100 * value:.4g}%"


def powers(value: float, _: int = 0) -> str:
    """Powers of two as 512, 1k, 2k; other numbers as they are."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 512 == 0 else f"{value:,.10g}"


def _plain(value: float, _: int) -> str:
    return f"{value:,.10g}"


# ---- labels

LABEL, LEVEL = "matkv-label", "matkv-level"  # what annotations are told by
# Where the label of a point may stand, in points from it, and where that of a level may, from its
# right end or its left: the first place that is free.
PLACES = ((0, 10), (0, -10), (20, 8), (-20, 8), (20, -8), (-20, -8))
ENDS = (("right", -10), ("right", 10), ("left", -10), ("left", 10))
GRAIN = 5.0  # pixels between two of the boxes that stand for a line


def place_labels(canvas: Canvas) -> None:
    """Move labels to where nothing else is; those of points that find no room are hidden."""
    canvas.figure.draw_without_rendering()
    for axes in canvas.figure.axes:
        taken = [box for line in axes.lines for box in _boxes(axes, line)]
        for label in (one for one in axes.texts if one.get_gid() == LEVEL):
            taken.append(_placed_level(label, taken))
        for label in (one for one in axes.texts if one.get_gid() == LABEL):
            taken += _placed(label, taken)


def _placed_level(label: Any, taken: Sequence[Any]) -> Any:
    """The box of a level's label; at the right end below, where no place is free."""
    for side, offset in (*ENDS, ENDS[0]):
        label.set(ha=side, position=(0, offset))
        label.xy = (float(side == "right"), label.xy[1])
        box = label.get_window_extent()
        if not any(map(box.overlaps, taken)):
            break
    return box


def _placed(label: Any, taken: Sequence[Any]) -> list[Any]:
    """The box of a point's label at the first place that is free; none where it is hidden."""
    for place in PLACES:
        label.set_position(place)
        box = label.get_window_extent()
        if not any(map(box.overlaps, taken)):
            return [box]
    label.set_visible(False)
    return []


def _boxes(axes: Any, line: Any) -> list[Any]:
    """What no label may cover of a line: its points, and the way between them in small boxes."""
    from matplotlib.transforms import Bbox

    if line.get_transform() != axes.transData:  # a level, all the way across
        (_, y) = axes.transData.transform((axes.get_xlim()[0], line.get_ydata()[0]))
        return [Bbox.from_extents(axes.bbox.x0, y - 1, axes.bbox.x1, y + 1)]
    points = axes.transData.transform(line.get_xydata())
    boxes = [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in points]
    for start, end in pairwise(points):
        parts = int(math.dist(start, end) / GRAIN) + 1
        for x, y in (start + (end - start) * part / parts for part in range(parts)):
            boxes.append(Bbox.from_extents(x - 1, y - 1, x + 1, y + 1))
    return boxes
