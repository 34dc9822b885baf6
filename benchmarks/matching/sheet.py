"""What was measured as figures: means, errors of differences to the full cache, cells to show.

Errors are standard errors, item by item.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .records import Json, Records

OVER = 1.02  # bytes this far beyond a budget are over it: pages and spare room are counted too
NONE = "–"
FOOTPRINT = "footprint"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A cell: what is shown, and its worth if it takes part in who is best; more is better."""

    shown: str = NONE
    worth: float | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table of a budget."""

    title: str
    figure: Callable[[Json], Figure]


class Sheet:
    """The last run's rows and columns with their values, as many items as all rows have.

    Means and errors of a row are over the items that it shares with the full cache.
    """

    def __init__(self, records: Records) -> None:
        self.records, self.rows = records, records.rows
        self.full = next((row for row in self.rows if row["level"] is None), None)
        self.columns = {one["column"]: one for one in records.columns}
        self.texts, self.retrievals, self.tasks = (
            [name for name, one in self.columns.items() if one["kind"] == kind]
            for kind in ("text", "retrieval", "task")
        )

    def values(self, row: Json, column: str) -> list[Json]:
        if column not in self.columns:
            return []
        one = self.columns[column]
        return self.records.values(row, column, one["data"])[: one["count"]]

    def mean(self, row: Json, column: str, name: str) -> float | None:
        values = [one[name] for one in self.values(row, column) if one.get(name) is not None]
        return statistics.fmean(values) if values else None

    def difference(self, row: Json, column: str, name: str) -> tuple[float, float] | None:
        """Mean difference to the full cache over the items of both, and its standard error."""
        base = [] if self.full is None else self.values(self.full, column)
        pairs = list(zip(self.values(row, column), base, strict=False))
        apart = [one[name] - other[name] for one, other in pairs]
        if not apart:
            return None
        spread = statistics.stdev(apart) if len(apart) > 1 else math.nan
        return statistics.fmean(apart), spread / math.sqrt(len(apart))

    def growth(self, row: Json) -> float | None:
        """What a further token costs, over the full cache's bytes.

        Of resident memory; of a simulated method what its format says.
        """
        if row["simulated"]:
            return self.mean(row, self.texts[0], "grown")
        measured = self.mean(row, FOOTPRINT, "bytes_per_token")
        return None if measured is None else measured / row["full_bytes_per_token"]

    def is_over(self, row: Json) -> bool:
        """Whether a row costs more than its budget by what its format says."""
        grown = self.mean(row, self.texts[0], "grown")
        fits = row["family"] == "eviction" or row["method"] == "QuantizedCache"
        level = row["level"]
        return level is not None and not fits and grown is not None and grown > level * OVER


# ---- figures


def _signed(found: tuple[float, float] | None, scale: float = 1, digits: int = 3) -> str:
    if found is None:
        return ""
    mean, error = (scale * one for one in found)
    plus = "" if math.isnan(error) else f" ± {error:.{digits}f}"
    return f" ({mean:+.{digits}f}{plus})"


def perplexity(sheet: Sheet, column: str) -> Callable[[Json], Figure]:
    def figure(row: Json) -> Figure:
        mean = sheet.mean(row, column, "loss")
        if mean is None:
            return Figure()
        apart = "" if row is sheet.full else _signed(sheet.difference(row, column, "loss"))
        shown = f"{math.exp(mean):.2f}" if mean < 7 else f"{math.exp(mean):.0f}"
        return Figure(shown=shown + apart, worth=-mean)

    return figure


def plain(
    sheet: Sheet, column: str, name: str, form: str, *, sign: int = 1, scale: float = 1
) -> Callable[[Json], Figure]:
    """A mean; `sign` is -1 where less is better."""

    def figure(row: Json) -> Figure:
        mean = sheet.mean(row, column, name)
        if mean is None:
            return Figure()
        return Figure(shown=form.format(scale * mean), worth=sign * mean)

    return figure


def found_answers(sheet: Sheet, column: str) -> Callable[[Json], Figure]:
    """Right answers, and the loss of the right one, which tells rows apart that find as many."""

    def figure(row: Json) -> Figure:
        values = sheet.values(row, column)
        if not values:
            return Figure()
        right, loss = sum(one["right"] for one in values), sheet.mean(row, column, "loss")
        assert loss is not None
        shown = f"{right}/{len(values)}, {loss:.2f}"
        return Figure(shown=shown, worth=right / len(values) - 1e-3 * loss)

    return figure


def accuracy(sheet: Sheet, tasks: Sequence[str]) -> Callable[[Json], Figure]:
    """The average of tasks in percent, and its difference to the full cache's in points."""

    def figure(row: Json) -> Figure:
        means = [sheet.mean(row, task, "right") for task in tasks]
        known = [one for one in means if one is not None]
        if not tasks or len(known) < len(tasks):
            return Figure()
        mean = statistics.fmean(known)
        if row is sheet.full:
            return Figure(shown=f"{100 * mean:.1f}", worth=mean)
        apart = [one for task in tasks if (one := sheet.difference(row, task, "right"))]
        error = math.sqrt(math.fsum(one[1] ** 2 for one in apart)) / len(apart)
        both = statistics.fmean(one[0] for one in apart), error
        return Figure(shown=f"{100 * mean:.1f}{_signed(both, 100, 1)}", worth=mean)

    return figure


def speed(sheet: Sheet, name: str) -> Callable[[Json], Figure]:
    """Milliseconds or tokens a second, and how many times the full cache's time."""

    def figure(row: Json) -> Figure:
        ms, over = (sheet.mean(row, FOOTPRINT, f"{name}_{it}") for it in ("ms", "over_full"))
        if ms is None or over is None:
            return Figure()
        shown = (
            f"{1e3 / ms:.1f} (× {1 / over:.2f})" if name == "step" else f"{ms:,.0f} (× {over:.2f})"
        )
        return Figure(shown=shown, worth=-over)

    return figure


def columns(sheet: Sheet) -> list[Column]:
    """All columns of a budget's table."""
    found = []
    for text in sheet.texts:
        found += [
            Column(title=f"{text}: perplexity (nats over full)", figure=perplexity(sheet, text)),
            Column(title="KL", figure=plain(sheet, text, "kl", "{:.3f}", sign=-1)),
            Column(title="same next token", figure=plain(sheet, text, "agree", "{:.1%}")),
        ]
    for test in sheet.retrievals:
        title = f"{test}: found, loss of the answer"
        found.append(Column(title=title, figure=found_answers(sheet, test)))
    if sheet.tasks:
        title = f"{len(sheet.tasks)} tasks, % (points over full)"
        found.append(Column(title=title, figure=accuracy(sheet, sheet.tasks)))
    if FOOTPRINT not in sheet.columns:
        return found
    peak = plain(sheet, FOOTPRINT, "prompt_peak_bytes", "{:.0f}", sign=-1, scale=2**-20)
    return [
        *found,
        Column(title="peak of a prompt, MiB", figure=peak),
        Column(title="first token, ms", figure=speed(sheet, "first_token")),
        Column(title="tokens/s", figure=speed(sheet, "step")),
    ]
