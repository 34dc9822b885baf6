"""Pictures of embedding models of many sizes: maps of layer and dimension, lines over a ladder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matkv.report.pictures.figures import SMALL, Axis, Line, Panel, frame, lines
from matkv.report.pictures.theme import NARROW, WIDE, Canvas, Picture, picture

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SizeMap:
    """What sizes score, by (layer, dimension); those in `marked` were trained."""

    title: str
    values: Mapping[Size, float]
    marked: Sequence[Size] = ()


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """One way to get models of all sizes: what each scores; `style` None is the reference."""

    label: str
    values: Mapping[Size, float]
    bounds: Mapping[Size, tuple[float, float]] = field(default_factory=dict)
    style: int | None = 0


def size_maps(name: str, shown: Sequence[SizeMap], *, text: str, caption: str = "") -> Picture:
    """Maps one below the other: layers down, dimensions across, trained sizes in frames."""
    rows = [len({layer for layer, _ in one.values}) for one in shown]

    def draw(canvas: Canvas) -> None:
        grid = canvas.figure.subplots(len(shown), 1, squeeze=False, height_ratios=rows)
        for axes, one in zip(grid.flat, shown, strict=True):
            _size_map(canvas, axes, one)

    height = sum(26 * count + 66 for count in rows)
    return picture(
        name, draw, wide=(WIDE, height), narrow=(NARROW, height), text=text, caption=caption
    )


def _size_map(canvas: Canvas, axes: Any, shown: SizeMap) -> None:
    import numpy as np

    layers, dims = (sorted({size[axis] for size in shown.values}) for axis in (0, 1))
    cells = np.full((len(layers), len(dims)), math.nan)
    for (layer, dim), value in shown.values.items():
        cells[layers.index(layer), dims.index(dim)] = value
    frame(canvas, axes)
    axes.grid(False)
    drawn = np.ma.masked_invalid(cells)
    image = axes.pcolormesh(drawn, cmap="cividis", lw=0.4, edgecolor="face")
    low, high = image.get_clim()
    for row, layer in enumerate(layers):
        for column, dim in enumerate(dims):
            value = cells[row, column]
            if not math.isfinite(value):
                continue
            # The map's colours are the same on light and dark paper, and so is what stands on them.
            ink = "#15181c" if value > (low + high) / 2 else "#fdfdfc"
            bold = (layer, dim) in shown.marked
            axes.text(
                column + 0.5, row + 0.5, f"{value:.3f}", ha="center", va="center", color=ink,
                fontsize=SMALL - (3 if canvas.narrow else 0), fontweight="bold" if bold else None,
            )  # fmt: skip
            if bold:
                corners = ([column, column + 1, column + 1, column], [row, row, row + 1, row + 1])
                axes.fill(*corners, fill=False, edgecolor=canvas.color("c2"), lw=2, zorder=4)
    axes.set_ylim(len(layers), 0)
    axes.set_xticks([column + 0.5 for column in range(len(dims))], labels=list(map(str, dims)))
    axes.set_yticks([row + 0.5 for row in range(len(layers))], labels=list(map(str, layers)))
    axes.set_xlabel("dimensions")
    axes.set_ylabel("layers")
    axes.set_title(shown.title, fontsize=SMALL, color=canvas.color("ink"), loc="left")


def ladder_lines(
    name: str, panels: Mapping[str, Sequence[Ladder]], *, y: str, text: str, caption: str = ""
) -> Picture:
    """A panel for each task: what every way gives at each size of the ladder, small to large."""
    return lines(
        name,
        [_ladder_panel(title, ways, y) for title, ways in panels.items()],
        text=text,
        caption=caption,
    )


def _ladder_panel(title: str, ways: Sequence[Ladder], y: str) -> Panel:
    sizes = sorted({size for way in ways for size in way.values})
    places = {size: float(index) for index, size in enumerate(sizes)}
    return Panel(
        title=title,
        x=Axis(
            label="size: layers x dimensions",
            ticks=[(places[size], f"{size[0]}x{size[1]}") for size in sizes],
        ),
        y=Axis(label=y),
        lines=[
            Line(
                label=way.label,
                points=[(places[size], value) for size, value in way.values.items()],
                bounds=[way.bounds[size] for size in way.values] if way.bounds else (),
                style=way.style,
            )
            for way in ways
        ],
    )
