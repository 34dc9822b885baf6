"""Pictures of a benchmark, from its rows as JSON: latency, throughput, and what fits a memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matkv.errors import MatkvError
from matkv.files import replacing
from matkv.report.pictures.curves import new_figure

Row = Mapping[str, Any]
GREYS, COLORS = ("#9aa0a6", "#5f6368"), ("#1f77b4", "#2b8a3e", "#e8590c", "#d6336c", "#7048e8")


def plot_benchmark(
    rows: Sequence[Row], directory: str | Path, *, memory: int | None = None
) -> list[Path]:
    """Write latency.png, throughput.png and largest_context.png; returns their paths.

    Latency against context is at the smallest batch, throughput against batch at the longest
    context, and only where weights and cache fit `memory` bytes. None stands for what the weights
    and the largest measured full cache take.

    Raises:
        MatkvError: matplotlib is not installed, or there are no rows.
    """
    if not rows:
        raise MatkvError("no rows to plot: the benchmark measured nothing")
    if memory is None:
        memory = max(row["weight_bytes"] + row["cache_bytes"] for row in rows if not row["budget"])
    pictures: dict[str, Callable[[Any], None]] = {
        "latency": lambda axes: _latency(axes, rows),
        "throughput": lambda axes: _throughput(axes, rows, memory),
        "largest_context": lambda axes: _largest_context(axes, rows, memory),
    }
    return [_save(draw, Path(directory) / f"{name}.png") for name, draw in pictures.items()]


def _latency(axes: Any, rows: Sequence[Row]) -> None:
    batch = min(row["batch"] for row in rows)
    for name, color in _colors(rows).items():
        points = [row for row in rows if (row["name"], row["batch"]) == (name, batch)]
        x = [row["context"] for row in points]
        axes.plot(x, [row["step_ms"] for row in points], "o-", ms=4, color=color, label=name)
        bounds = ([row[f"step_ms_{end}"] for row in points] for end in ("low", "high"))
        axes.fill_between(x, *bounds, color=color, alpha=0.15, lw=0)
    _powers(axes, sorted({row["context"] for row in rows}), "cached tokens")
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_ylabel("ms per decoding step")
    axes.set_title(f"Decoding step, batch {batch}: median and quartiles", fontsize=10)
    axes.legend(frameon=False, title="cache")


def _throughput(axes: Any, rows: Sequence[Row], memory: int) -> None:
    context = max(row["context"] for row in rows)
    for name, color in _colors(rows).items():
        points = [
            row
            for row in rows
            if (row["name"], row["context"]) == (name, context)
            and row["weight_bytes"] + row["cache_bytes"] <= memory
        ]
        x, y = ([row[key] for row in points] for key in ("batch", "tokens_per_second"))
        axes.plot(x, y, "o-", ms=4, color=color, label=name if points else f"{name}: none fits")
    _powers(axes, sorted({row["batch"] for row in rows}), "batch")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens/s")
    axes.set_title(
        f"Throughput at {context:,} cached tokens, batches that fit {_size(memory)}", fontsize=10
    )
    axes.legend(frameon=False, title="cache")


def _largest_context(axes: Any, rows: Sequence[Row], memory: int) -> None:
    """Bars: what weights leave of the memory, over the bytes of a token at the longest context."""
    batch, context = min(r["batch"] for r in rows), max(r["context"] for r in rows)
    colors = _colors(rows)
    for row in rows:
        if (row["batch"], row["context"]) != (batch, context):
            continue
        tokens = max(0, memory - row["weight_bytes"]) / row["cache_bytes"] * context
        axes.barh(row["name"], tokens, color=colors[row["name"]])
        axes.annotate(
            f" {tokens:,.0f}", (tokens, row["name"]), va="center", fontsize=8, color="#333333"
        )
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("cached tokens")
    axes.set_title(f"Largest context in {_size(memory)}, batch {batch}", fontsize=10)


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    """Greys for full caches, colours for budgets, in the order of the rows."""
    names = list(dict.fromkeys((row["name"], row["budget"]) for row in rows))
    full = [name for name, budget in names if budget is None]
    kept = [name for name, budget in names if budget is not None]
    found = {name: GREYS[i % len(GREYS)] for i, name in enumerate(full)}
    return found | {name: COLORS[i % len(COLORS)] for i, name in enumerate(kept)}


def _powers(axes: Any, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _plain_numbers(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")


def _size(count: float) -> str:
    power = min(3, int(math.log10(max(count, 1)) / 3))
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def _save(draw: Callable[[Any], None], path: Path) -> Path:
    figure = new_figure()
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    with replacing(path) as new:
        figure.savefig(new, format="png")
    return path
