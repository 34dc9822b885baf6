"""Maps of shares by layer and head, and fans of curves, one a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matkv.ranks import SIDES, RankTable, Side
from matkv.report.pictures.figures import (
    SMALL,
    Axis,
    Panel,
    Point,
    draw_panel,
    frame,
    percents,
)
from matkv.report.pictures.theme import NARROW, RAMP, WIDE, Canvas, Picture, picture

ACROSS, ACROSS_NARROW = 8, 4  # maps beside one another


@dataclass(frozen=True, kw_only=True)
class Map:
    """Shares in 0..1, a row of cells for each name in `rows`; NaN where there is none."""

    title: str
    cells: Sequence[Sequence[float]]
    rows: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Fan:
    """One curve a layer, first to last."""

    title: str
    curves: Sequence[Sequence[Point]]


def maps(
    name: str, shown: Sequence[Map], *, x: str, y: str, bar: str, text: str, caption: str
) -> Picture:
    """Maps in rows, under them the bar that says what their colours mean."""
    count = len(shown[0].rows)
    cell = 13 if count <= 12 else 10 if count <= 40 else 7

    def draw(canvas: Canvas) -> None:
        across = min(ACROSS_NARROW if canvas.narrow else ACROSS, len(shown))
        shape = (math.ceil(len(shown) / across), across)
        grid = canvas.figure.subplots(*shape, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(shown):
                axes.set_axis_off()
                continue
            image = _map(canvas, axes, shown[index])
            axes.set_xlabel(x)
            if index % across == 0:
                axes.set_ylabel(y)
            else:
                axes.set_yticks([])
        _bar(canvas, image, grid, bar)

    def size(width: int, across: int) -> tuple[int, int]:
        return width, 70 + math.ceil(len(shown) / across) * (cell * count + 74)

    wide, narrow = size(WIDE, ACROSS), size(NARROW, ACROSS_NARROW)
    return picture(name, draw, wide=wide, narrow=narrow, text=text, caption=caption)


def rank_maps(name: str, tables: Mapping[float, RankTable], *, caption: str = "") -> Picture:
    """Kept bytes by layer and KV head, keys and values side by side, for each budget.

    The paper's Figure 1 (arXiv 2410.14731) shows such maps of LLaMA2-7B.
    """
    shown = [
        Map(
            title=f"{percents(budget)}\n{side}s {table.share(side):.0%}",
            cells=_fractions(table, side),
            rows=[str(layer) for layer in table.geometry.compressed],
        )
        for budget, table in tables.items()
        for side in SIDES
    ]
    text = "What every layer and KV head keeps, keys and values side by side, for each budget."
    is_coded = any(table.coded for table in tables.values())
    bar = "bytes kept of the full ones" if is_coded else "columns kept of the head dim"
    return maps(name, shown, x="head", y="layer", bar=bar, text=text, caption=caption)


def _fractions(table: RankTable, side: Side) -> list[list[float]]:
    """Kept share of every compressed layer and head; NaN where a layer has fewer heads."""
    shapes = table.geometry.layers
    heads = max(shapes[layer].kv_heads for layer in table.geometry.compressed)
    return [
        [bits / 16 for bits in table.bits(layer, side)]
        + [math.nan] * (heads - shapes[layer].kv_heads)
        for layer in table.geometry.compressed
    ]


def _map(canvas: Canvas, axes: Any, shown: Map) -> Any:
    import numpy as np

    frame(canvas, axes)
    axes.grid(False)
    # Vector cells rather than an image: sharp in print, and the same on every platform.
    cells = np.ma.masked_invalid(np.array(shown.cells, dtype=float))
    image = axes.pcolormesh(cells, vmin=0, vmax=1, cmap="cividis", lw=0.4, edgecolor="face")
    axes.set_ylim(len(shown.rows), 0)
    heads = range(0, cells.shape[1], max(1, math.ceil(cells.shape[1] / 4)))
    axes.set_xticks([head + 0.5 for head in heads], labels=[str(head) for head in heads])
    layers = range(0, len(shown.rows), max(1, math.ceil(len(shown.rows) / 16)))
    axes.set_yticks([row + 0.5 for row in layers], labels=[shown.rows[row] for row in layers])
    axes.set_title(shown.title, fontsize=SMALL, color=canvas.color("ink"))
    return image


def fans(
    name: str, shown: Sequence[Fan], *, x: str, y: str, bar: str, text: str, caption: str
) -> Picture:
    """Fans side by side on a logarithmic scale, their curves coloured by layer."""

    def draw(canvas: Canvas) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        colors = LinearSegmentedColormap.from_list("layers", RAMP)
        last = max(1, len(shown[0].curves) - 1)
        shape = (len(shown), 1) if canvas.narrow else (1, len(shown))
        grid = canvas.figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
        for axes, fan in zip(grid.flat, shown, strict=True):
            for index, curve in enumerate(fan.curves):
                xs, ys = ([point[axis] for point in curve] for axis in (0, 1))
                axes.plot(xs, ys, color=colors(index / last), lw=1.1, alpha=0.9)
            panel = Panel(title=fan.title, x=Axis(label=x), y=Axis(label=y, log=10), lines=())
            draw_panel(canvas, axes, panel, len(shown))
        _bar(canvas, ScalarMappable(Normalize(0, last), colors), grid, bar, whole=True)

    return picture(name, draw, wide=(WIDE, 370), narrow=(NARROW, 540), text=text, caption=caption)


def _bar(canvas: Canvas, colored: Any, grid: Any, label: str, *, whole: bool = False) -> None:
    """A colour bar below all of `grid`, in whole numbers or in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    bar = canvas.figure.colorbar(
        colored, ax=grid, location="bottom", shrink=0.6, aspect=40, pad=0.02
    )
    bar.outline.set_visible(False)
    frame(canvas, bar.ax)
    bar.ax.grid(False)
    bar.ax.set_xlabel(label)
    shown = FuncFormatter(lambda value, _: f"{value:g}" if whole else f"{value:.0%}")
    bar.ax.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    bar.ax.xaxis.set_major_formatter(shown)
