"""Plots as PNG files, with matplotlib (the extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matkv.errors import MatkvError
from matkv.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#9aa0a6", "#1f77b4", "#d6336c", "#2b8a3e", "#e8590c")


def new_figure(width: float = 7, height: float = 4.2) -> Figure:
    """An empty figure, in inches, that needs no screen.

    Raises:
        MatkvError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatkvError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_quality(
    curves: Mapping[str, Sequence[tuple[float, float]]], full: float, path: Path, title: str
) -> Path:
    """Perplexity against budget: a line per curve of (budget, perplexity), the full cache dashed.

    The perplexity axis is logarithmic, the budget axis falls to the right: compression grows.

    Raises:
        MatkvError: matplotlib is not installed.
    """
    figure = new_figure()
    from matplotlib.ticker import FuncFormatter

    axes = figure.add_subplot()
    for (name, points), color in zip(curves.items(), COLORS, strict=False):
        budgets, values = zip(*sorted(points, reverse=True), strict=True)
        axes.plot(budgets, values, marker="o", ms=5, lw=1.8, color=color, label=name)
        axes.annotate(
            f"{values[-1]:.0f}", (budgets[-1], values[-1]), (6, 0), color=color,
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.axhline(full, color="#333333", ls="--", lw=1, label=f"full cache {full:.1f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: _minor(value)))
    ticks = sorted({budget for points in curves.values() for budget, _ in points})
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda budget, _: f"{100 * budget:g}%"))
    axes.invert_xaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("cache bytes kept")
    axes.set_ylabel("perplexity")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    with replacing(path) as new:
        figure.savefig(new, format="png")
    return path


def _minor(value: float) -> str:
    """Label the 2s, 3s and 5s of a logarithmic axis; the rest would overlap."""
    return f"{value:g}" if f"{value:e}"[0] in "235" else ""
