"""From right and wrong answers to accuracies, retention and their errors; no model in sight.

A row is one task at one budget, as `results` keeps it: `correct` and `correct_norm` hold a 1 or a 0
for every item, in the same order at every budget, so that two budgets can be compared item by item.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
AVERAGE = "average"
# What is kept but not shown.
PER_ITEM = ("correct", "correct_norm")


def bits(right: Iterable[float]) -> str:
    """Right and wrong as a string of 1 and 0."""
    return "".join("1" if one else "0" for one in right)


def accuracy(right: str) -> tuple[float, float | None]:
    """Share of ones and its standard error s/√n, None for a single item."""
    return _mean([int(one) for one in right])


def difference(right: str, baseline: str) -> tuple[float, float | None]:
    """Accuracy minus the baseline's on the same items, and the standard error of that.

    Paired: items that both get right or wrong add nothing, so the error is far below that of two
    independent accuracies.
    """
    pairs = zip(right, baseline, strict=True)
    return _mean([int(one) - int(other) for one, other in pairs])


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Every row with its retention, then one row of averages over the tasks of each budget.

    `retention` is accuracy over the full cache's, `retention_above_chance` the same after taking
    off what guessing gives, None where the full cache does not beat guessing. `difference` is to
    the full cache, over the same items. All are None without a row of the full cache. Averages are
    over tasks, each counting alike, and their errors those of a sum of independent tasks.
    """
    full = {row["task"]: row for row in rows if row["budget"] is None}
    shown = [_shown(row, full.get(row["task"])) for row in rows]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    whole = _average([row for row in shown if row["budget"] is None], None)
    averages = [
        _average([row for row in shown if row["budget"] == budget], whole) for budget in budgets
    ]
    return shown + [row for row in averages if row is not None]


def _shown(row: Row, full: Row | None) -> Row:
    shown = {name: value for name, value in row.items() if name not in PER_ITEM}
    gap, error = (None, None) if full is None else difference(row["correct"], full["correct"])
    return shown | {"difference": gap, "difference_stderr": error} | _retention(row, full)


def _retention(row: Row, full: Row | None) -> Row:
    kept = above = None
    if full is not None and full["acc"] > 0:
        kept = row["acc"] / full["acc"]
    if full is not None and full["acc"] > full["chance"]:
        above = (row["acc"] - row["chance"]) / (full["acc"] - full["chance"])
    return {"retention": kept, "retention_above_chance": above}


def _average(rows: Sequence[Row], full: Row | None) -> Row | None:
    if not rows:
        return None
    average: Row = {
        "task": AVERAGE,
        "budget": rows[0]["budget"],
        "kept": rows[0]["kept"],
        "tasks": len(rows),
        "n": sum(row["n"] for row in rows),
    }
    for name in ("acc", "acc_norm", "chance", "difference"):
        values = [row[name] for row in rows]
        average[name] = None if None in values else sum(values) / len(rows)
    for name in ("stderr", "acc_norm_stderr", "difference_stderr"):
        errors = [row[name] for row in rows]
        squares = None if None in errors else math.fsum(error**2 for error in errors)
        average[name] = None if squares is None else math.sqrt(squares) / len(rows)
    return average | _retention(average, average if rows[0]["budget"] is None else full)


def _mean(values: Sequence[int]) -> tuple[float, float | None]:
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)
