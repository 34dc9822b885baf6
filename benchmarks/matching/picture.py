"""Loss against bytes: every method in one picture, ours thick, others in their families' colours.

Bytes are those held of a window of text, exact tokens included, on a logarithmic axis; loss is in
nats a token over the full cache, on the last text of a run. What loses more than `TOP` is above the
picture, and a method that has nothing below it is not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matkv.report.pictures import theme
from matkv.report.pictures.figures import Axis, Panel, draw_panel, percents
from matkv.report.pictures.theme import NARROW, WIDE, Canvas, Picture

from .labels import Box, Room, extent
from .records import Json, Records
from .sheet import Sheet

TOP, LEAST, MOST = 1.2, 0.045, 0.7
FAMILIES = {
    "matkv": ("matkv", "c1"),
    "quantization": ("codes of keys and values", "c2"),
    "eviction": ("evicting tokens", "c3"),
    "low rank": ("low rank", "c7"),
}
TICKS = (0.0625, 0.125, 0.25, 0.5)
OURS = "matkv"
Points = list[tuple[float, float]]
Series = tuple[str, str, Points]


def picture_of(series: Sequence[Series], text: str) -> Picture:
    """Draw (label, family, points) of every method; `text` names what was read."""
    low = [one for one in series if any(loss <= TOP for _, loss in one[2])]
    ordered = sorted(low, key=lambda one: (one[1] != OURS, one[0] != OURS))

    def draw(canvas: Canvas) -> None:
        axes = _axes(canvas)
        lines = [_line(canvas, axes, *one) for one in ordered]
        legend = _legend(canvas, axes, {family for _, family, _ in ordered})
        canvas.figure.draw_without_rendering()
        room = Room(extent(axes))
        box = legend.get_window_extent()
        room.boxes.append(Box(box.x0, box.y0, box.x1, box.y1))
        nothing = [tuple(axes.transData.transform((x, 0))) for x in (MOST, LEAST)]
        room.lines.append((nothing[0], nothing[1], 2))
        for (label, family, points), line in zip(ordered, lines, strict=True):
            shown = [tuple(axes.transData.transform(one)) for one in sorted(points)]
            weight = 1 if family != OURS else 4
            room.add_line(shown, line.get_markersize() if label == OURS else 4, weight)
        for one in ordered:
            if one[0] == OURS or not canvas.narrow:
                _name(canvas, axes, room, *one)

    said = f"Loss over the full cache against bytes held, {text}: " + "; ".join(
        f"{label} " + ", ".join(f"{loss:+.2f} at {held:.1%}" for held, loss in points)
        for label, _, points in series
    )
    return theme.picture("matched", draw, wide=(WIDE, 500), narrow=(NARROW, 380), text=said)


def _axes(canvas: Canvas) -> Any:
    axes = canvas.figure.subplots()
    ticks = [(tick, percents(tick)) for tick in TICKS]
    panel = Panel(
        x=Axis(label="bytes held, of the full cache's", log=2, ticks=ticks, span=(LEAST, MOST)),
        y=Axis(label="nats a token lost", span=(-0.05, TOP)),
        lines=(),
    )
    draw_panel(canvas, axes, panel, 1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(MOST, LEAST)
    axes.minorticks_off()
    axes.set_xticks(TICKS, labels=[percents(tick) for tick in TICKS])
    axes.axhline(0, color=canvas.color("muted"), lw=1, ls=(0, (4, 3)))
    return axes


def _line(canvas: Canvas, axes: Any, label: str, family: str, points: Points) -> Any:
    look: dict[str, Any] = {"lw": 1.1, "ms": 4, "zorder": 3, "alpha": 0.75}
    if label == OURS:
        look = {"lw": 3.6, "ms": 8, "zorder": 5}
    elif family == OURS:
        look = {"lw": 1.8, "ms": 4, "zorder": 4, "ls": (0, (4, 2))}
    x, y = zip(*sorted(points), strict=True)
    (line,) = axes.plot(x, y, color=canvas.color(FAMILIES[family][1]), marker="o", **look)
    return line


def _name(
    canvas: Canvas, axes: Any, room: Room, label: str, family: str, points: Points
) -> None:  # fmt: skip
    """A method's name near a point that can be seen, the last if there is room."""
    from matplotlib import patheffects

    seen = sorted(one for one in points if one[1] <= TOP and one[0] >= LEAST)
    ours, color = label == OURS, canvas.color(FAMILIES[family][1])
    text = axes.text(
        0, 0, label, color=color, ha="center", va="center", zorder=6,
        fontsize=13 if ours else 8.5, fontweight="bold" if ours else "normal",
    )  # fmt: skip
    text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground=canvas.color("paper"))])
    box = text.get_window_extent()
    pixels = [tuple(axes.transData.transform(one)) for one in seen]
    place = room.place(pixels, (box.width + 4, box.height + 2))
    at, middle = axes.transData.inverted().transform([place.at, place.middle])
    text.set_position(middle)
    if place.is_far:
        axes.plot(*zip(at, middle, strict=True), color=color, lw=0.6, alpha=0.6, zorder=2)


def _legend(canvas: Canvas, axes: Any, families: set[str]) -> Any:
    for family, (name, color) in FAMILIES.items():
        if family in families:
            axes.plot([], [], color=canvas.color(color), lw=3, label=name)
    return axes.legend(loc="upper left", labelcolor=canvas.color("ink"), fontsize=10.5)


def picture(records: Records) -> Picture | None:
    """The picture of what was measured; None while no method has a loss below the top."""
    sheet = Sheet(records)
    if sheet.full is None or not sheet.texts:
        return None
    text = sheet.texts[-1]
    found: dict[tuple[str, str], Points] = {}
    for row in sheet.rows:
        held, apart = sheet.mean(row, text, "held"), sheet.difference(row, text, "loss")
        if row["level"] is not None and held is not None and apart is not None:
            found.setdefault((series_of(row), row["family"]), []).append((held, apart[0]))
    series = [(label, family, points) for (label, family), points in found.items()]
    return picture_of(series, text) if series else None


def series_of(row: Json) -> str:
    """The name of a row's line: settings of a budget aside."""
    method: str = row["method"]
    setting: str = row["setting"]
    if row["family"] == OURS and method == OURS:
        variant = setting.split(", ")[0]
        is_itself = "exact" in variant and variant != "no exact tokens"
        return method if is_itself else f"{OURS}, {variant}"
    if method == "QuantizedCache":
        by_channel = " by channel" if "by channel" in setting else ""
        return f"{setting.split()[0]}{by_channel}"
    return method.removesuffix(" style").replace("int4 per", "integers per")
