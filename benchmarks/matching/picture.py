"""Loss against bytes: every method in one picture, ours thick, others in their families' colours.

Bytes are those held of a window of text, exact tokens included, on a logarithmic axis; loss is in
nats a token over the full cache, on the first text of a file, else on held-out articles. What loses
more than `TOP` is above the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matkv.report.pictures import theme
from matkv.report.pictures.figures import Axis, Panel, draw_panel, percents
from matkv.report.pictures.theme import NARROW, WIDE, Canvas, Picture

from .records import Json, Records
from .sheet import Sheet

TOP, LEAST = 1.2, 0.045
FAMILIES = {
    "matkv": ("matkv", "c1"),
    "quantization": ("codes of keys and values", "c2"),
    "eviction": ("evicting tokens", "c3"),
    "low rank": ("low rank", "c7"),
}
TICKS = (0.05, 0.0625, 0.125, 0.25, 0.5)
Points = list[tuple[float, float]]


def picture_of(series: Sequence[tuple[str, str, Points]], text: str) -> Picture:
    """Draw (label, family, points) of every method; `text` names what was read."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.figure.subplots()
        panel = Panel(
            x=Axis(
                label="bytes held, of the full cache's",
                log=2,
                ticks=[(tick, percents(tick)) for tick in TICKS],
                span=(LEAST, 0.62),
            ),
            y=Axis(label="nats a token lost", span=(-0.03, TOP)),
            lines=(),
        )
        draw_panel(canvas, axes, panel, 1)
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.62, LEAST)
        axes.minorticks_off()
        axes.set_xticks(TICKS[1:], labels=[percents(tick) for tick in TICKS[1:]])
        axes.axhline(0, color=canvas.color("muted"), lw=1, ls=(0, (4, 3)))
        canvas.figure.draw_without_rendering()
        placed: list[Any] = []
        for label, family, points in sorted(series, key=lambda one: one[1] != "matkv"):
            _draw(canvas, axes, label, family, points, placed)
        _legend(canvas, axes, {family for _, family, _ in series})

    said = f"Loss over the full cache against bytes held, {text}: " + "; ".join(
        f"{label} " + ", ".join(f"{loss:+.2f} at {held:.1%}" for held, loss in points)
        for label, _, points in series
    )
    return theme.picture("matched", draw, wide=(WIDE, 470), narrow=(NARROW, 380), text=said)


def _draw(
    canvas: Canvas, axes: Any, label: str, family: str, points: Points, placed: list[Any]
) -> None:
    """A method's line, and its name at the last point that can be seen, where there is room."""
    color, ours = canvas.color(FAMILIES[family][1]), label == "matkv"
    look: dict[str, Any]
    look = {"lw": 3.4, "ms": 8, "zorder": 4} if ours else {"lw": 1.2, "ms": 4, "zorder": 3}
    if family == "matkv" and not ours:
        look |= {"ls": (0, (4, 2)), "lw": 1.8}
    x, y = zip(*sorted(points), strict=True)
    axes.plot(x, y, color=color, marker="o", alpha=1 if family == "matkv" else 0.8, **look)
    seen = [one for one in points if one[1] <= TOP and one[0] >= LEAST]
    if not seen or (canvas.narrow and not ours):
        return
    at = min(seen)
    for offset in ((6, 0), (6, 10), (6, -10), (6, 20), (-6, 10), (-6, -10), (6, -20), (-6, 22)):
        text = axes.annotate(
            label, at, offset, textcoords="offset points", va="center", color=color,
            ha="left" if offset[0] > 0 else "right", fontsize=12 if ours else 8.5,
            fontweight="bold" if ours else "normal",
        )  # fmt: skip
        box = text.get_window_extent()
        if not any(box.overlaps(other) for other in placed):
            placed.append(box)
            return
        text.remove()


def _legend(canvas: Canvas, axes: Any, families: set[str]) -> None:
    for family, (name, color) in FAMILIES.items():
        if family in families:
            axes.plot([], [], color=canvas.color(color), lw=3, label=name)
    axes.legend(loc="upper left", labelcolor=canvas.color("ink"), fontsize=10.5)


def picture(records: Records) -> Picture | None:
    """The picture of what was measured; None while no method has a loss."""
    sheet = Sheet(records)
    if sheet.full is None or not sheet.texts:
        return None
    text = sheet.texts[-1] if len(sheet.texts) > 1 else sheet.texts[0]
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
    if row["family"] == "matkv" and method == "matkv":
        variant: str = row["setting"].split(", ")[0]
        is_itself = "exact" in variant and variant != "no exact tokens"
        return method if is_itself else f"matkv, {variant}"
    if method == "QuantizedCache":
        return f"{method}, {row['setting'].split()[0]}"
    return method.removesuffix(" style").replace("int4 per", "integers per")
