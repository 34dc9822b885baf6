"""The Markdown tables of what was measured: two a budget, who wins where, and the tasks.

The best figure of every column stands in bold, ours or another's, among the rows whose bytes are
within the budget; where but one was measured, none is. Errors are standard errors, of differences
to the full cache item by item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figures import NONE, Column, Figure, averaged, cost_columns, question_columns, text_columns
from .notes import failures, head
from .records import Json, Records
from .sheet import Sheet, even


def markdown(records: Records) -> str:
    """Everything that is known of the last run."""
    sheet = Sheet(records)
    if sheet.full is None:
        return "nothing was measured yet\n"
    levels = sorted({row["level"] for row in sheet.rows if row["level"]}, reverse=True)
    texts, others = text_columns(sheet), [*question_columns(sheet), *cost_columns(sheet)]
    parts = [head(sheet), "### Who wins\n\n" + winners(sheet, [*texts, *others], levels)]
    for level in levels:
        parts += [f"### {level:.4g} of the bytes", budget(sheet, level, texts, shares=True)]
        parts.append(budget(sheet, level, others, shares=False))
    if sheet.tasks:
        parts.append("### Tasks\n\n" + tasks(sheet, levels))
    return "\n\n".join(part for part in [*parts, failures(sheet)] if part) + "\n"


def budget(sheet: Sheet, level: float, columns: Sequence[Column], *, shares: bool) -> str:
    """A table of one budget, the full cache on top; rows of which nothing is known are left out.

    `shares` also shows bytes.
    """
    assert sheet.full is not None
    rows = [row for row in sheet.rows if row["level"] == level]
    lines = [["method", *(["bytes/token", "held"] if shares else []), *(c.title for c in columns)]]
    lines.append(["---"] * len(lines[0]))
    cells = [_figures(sheet, rows, column) for column in columns]
    shown = [(sheet.full, [column.figure(sheet.full).shown for column in columns])]
    shown += [(row, [column[index] for column in cells]) for index, row in enumerate(rows)]
    for row, figures in shown:
        if any(one != NONE for one in figures):
            lines.append([_name(sheet, row), *(_shares(sheet, row) if shares else []), *figures])
    return _lines(lines) if len(lines) > 2 else ""


def _figures(sheet: Sheet, rows: Sequence[Json], column: Column) -> list[str]:
    """What a column shows of rows, the best in bold."""
    figures = [column.figure(row) for row in rows]
    best = _best(sheet, rows, figures)
    return [
        f"**{one.shown}**" if one.worth is not None and one.worth == best else one.shown
        for one in figures
    ]


def _best(sheet: Sheet, rows: Sequence[Json], figures: Sequence[Figure]) -> float | None:
    worths = [
        figure.worth
        for row, figure in zip(rows, figures, strict=True)
        if figure.worth is not None and not sheet.is_over(row)
    ]
    return max(worths) if len(worths) > 1 else None


def name_of(row: Json) -> str:
    """A row's method and setting, with what is to be said of its bytes."""
    name = ", ".join(part for part in (row["method"], row["setting"]) if part)
    return f"{name} †" if row["simulated"] else name


def _name(sheet: Sheet, row: Json) -> str:
    name = name_of(row) + (" ‡" if sheet.is_over(row) else "")
    return f"**{name}**" if row["family"] == "matkv" else name


def _shares(sheet: Sheet, row: Json) -> list[str]:
    shares = sheet.growth(row), sheet.mean(row, sheet.texts[0], "held")
    return [NONE if one is None else f"{one:.1%}" for one in shares]


# ---- who wins


def winners(sheet: Sheet, columns: Sequence[Column], levels: Sequence[float]) -> str:
    """Who has the best figure of every column at every budget, and who is even with it."""
    lines = [["", *(f"{level:.2%}" for level in levels)], ["---"] * (len(levels) + 1)]
    for column in columns:
        cells = [_winner(sheet, column, level) for level in levels]
        if any(cell != NONE for cell in cells):
            lines.append([column.name, *cells])
    return _lines(lines)


def _winner(sheet: Sheet, column: Column, level: float) -> str:
    rows = [row for row in sheet.rows if row["level"] == level and not sheet.is_over(row)]
    worths = [(worth, row) for row in rows if (worth := column.figure(row).worth) is not None]
    if len(worths) < 2:
        return NONE
    best = max(worth for worth, _ in worths)
    first = [row for worth, row in worths if worth == best]
    items = column.items(first[0])
    beside = [
        row
        for worth, row in sorted(worths, key=lambda one: -one[0])
        if worth < best and even(items, column.items(row))
    ]
    told = _some(first)
    return f"{told}; even: {_some(beside)}" if beside else told


def _some(rows: Sequence[Json], most: int = 1) -> str:
    """Names of some rows, ours in bold and first among those after the first `most`."""
    ours = [row for row in rows[most:] if row["family"] == "matkv"]
    shown = [*rows[:most], *ours[:1]]
    names = [f"**{name_of(row)}**" if row["family"] == "matkv" else name_of(row) for row in shown]
    more = len(rows) - len(shown)
    return " · ".join(names) + (f" and {more} more" if more else "")


# ---- task by task


def tasks(sheet: Sheet, levels: Sequence[float]) -> str:
    """Every task's accuracy in percent, and its difference to the full cache in points."""
    lines = [["budget", "method", *sheet.tasks], ["---"] * (2 + len(sheet.tasks))]
    for level in (None, *levels):
        for row in (row for row in sheet.rows if row["level"] == level):
            figures = [averaged(sheet, [task], "right", 100, 1)(row) for task in sheet.tasks]
            if any(one.worth is not None for one in figures):
                name = "100%" if level is None else f"{level:.2%}"
                lines.append([name, name_of(row), *(one.shown for one in figures)])
    return _lines(lines) if len(lines) > 2 else "None was scored."


def summary(records: Records) -> list[dict[str, Any]]:
    """Every row with its figures and numbers of items, for a JSON file."""
    sheet = Sheet(records)
    found = []
    for row in sheet.rows:
        figures = {
            f"{column}.{name}": sheet.mean(row, column, name)
            for column in sheet.columns
            for name in sorted({key for one in sheet.values(row, column) for key in one})
        }
        counts = {f"{column}.items": len(sheet.values(row, column)) for column in sheet.columns}
        growth = sheet.growth(row) if sheet.texts else None
        found.append(row | {"growth": growth, "over": sheet.is_over(row), **counts, **figures})
    return found


def _lines(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
