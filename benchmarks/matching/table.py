"""The Markdown tables of what was measured: one a budget, who wins where, and the tasks.

The best figure of every column stands in bold, ours or another's, among the rows whose bytes are
within the budget. Errors are standard errors, of differences to the full cache item by item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matkv.artifact.records import Record

from .records import Json, Records
from .sheet import FOOTPRINT, NONE, Column, Figure, Sheet, accuracy, columns


def markdown(records: Records) -> str:
    """Everything that is known of the last run."""
    sheet = Sheet(records)
    if sheet.full is None:
        return "nothing was measured yet"
    levels = sorted({row["level"] for row in sheet.rows if row["level"]}, reverse=True)
    parts = [head(sheet), "### Who wins\n\n" + winners(sheet, levels)]
    parts += [f"### {level:.4g} of the bytes\n\n{budget(sheet, level)}" for level in levels]
    if sheet.tasks:
        parts.append("### Tasks\n\n" + tasks(sheet, levels))
    failed = failures(sheet)
    return "\n\n".join([*parts, *([failed] if failed else [])]) + "\n"


def head(sheet: Sheet) -> str:
    """On what, where and when; how many items."""
    row, made = sheet.rows[0], sheet.records.made
    counts = [
        f"{name} {len(sheet.values(row, name))}" for name in sheet.columns if name != FOOTPRINT
    ]
    last: Record = made[-1] if made else {}
    versions = ", ".join(f"{name} {its}" for name, its in last.get("versions", {}).items())
    return (
        f"{row['model']} in {row['dtype']}; {last.get('hardware')}; {versions}; "
        f"{last.get('date')}. Items: {', '.join(counts)}. † counts bytes by its format, as it is "
        "simulated; ‡ is over the budget and takes no part in who is best. Bytes: resident memory "
        "that a further token adds, and what is held of a window of text, exact tokens included; "
        f"both over the full cache in {row['dtype']}."
    )


def budget(sheet: Sheet, level: float) -> str:
    """The table of one budget, the full cache on top."""
    assert sheet.full is not None
    rows = [row for row in sheet.rows if row["level"] == level]
    shown = columns(sheet)
    lines = [["method", "bytes/token", "held", *(column.title for column in shown)]]
    lines.append(["---"] * len(lines[0]))
    lines.append(_cells(sheet, sheet.full, [column.figure(sheet.full).shown for column in shown]))
    cells = [_figures(sheet, rows, column) for column in shown]
    for index, row in enumerate(rows):
        lines.append(_cells(sheet, row, [column[index] for column in cells]))
    return _lines(lines)


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
    return max(worths, default=None)


def name_of(row: Json) -> str:
    """A row's method and setting, with what is to be said of its bytes."""
    name = ", ".join(part for part in (row["method"], row["setting"]) if part)
    return f"{name} †" if row["simulated"] else name


def _cells(sheet: Sheet, row: Json, figures: list[str]) -> list[str]:
    growth, held = sheet.growth(row), sheet.mean(row, sheet.texts[0], "held")
    over = " ‡" if sheet.is_over(row) else ""
    shares = [NONE if one is None else f"{one:.1%}" for one in (growth, held)]
    name = name_of(row) + over
    return [f"**{name}**" if row["family"] == "matkv" else name, *shares, *figures]


def winners(sheet: Sheet, levels: Sequence[float]) -> str:
    """Who has the best figure of every column at every budget."""
    shown = columns(sheet)
    kinds = ["KL", "same next token"]
    titles, text = [], ""
    for column in shown:
        plain_title = column.title.partition(" (")[0].partition(": found")[0]
        text = plain_title.partition(":")[0] if ":" in plain_title else text
        titles.append(f"{text}: {plain_title}" if plain_title in kinds else plain_title)
    lines = [["", *(f"{level:.2%}" for level in levels)], ["---"] * (len(levels) + 1)]
    for title, column in zip(titles, shown, strict=True):
        lines.append([title, *(_winner(sheet, column, level) for level in levels)])
    return _lines(lines)


def _winner(sheet: Sheet, column: Column, level: float) -> str:
    rows = [row for row in sheet.rows if row["level"] == level]
    figures = [column.figure(row) for row in rows]
    best = _best(sheet, rows, figures)
    names = [
        name_of(row)
        for row, figure in zip(rows, figures, strict=True)
        if figure.worth is not None and figure.worth == best and not sheet.is_over(row)
    ]
    named = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return f"**{named}**" if any(name.startswith("matkv") for name in names) else named or NONE


def tasks(sheet: Sheet, levels: Sequence[float]) -> str:
    """Every task's accuracy in percent, and its difference to the full cache in points."""
    lines = [["budget", "method", *sheet.tasks], ["---"] * (2 + len(sheet.tasks))]
    for level in (None, *levels):
        for row in (row for row in sheet.rows if row["level"] == level):
            figures = [accuracy(sheet, [task])(row) for task in sheet.tasks]
            if any(one.worth is not None for one in figures):
                name = "100%" if level is None else f"{level:.2%}"
                lines.append([name, name_of(row), *(one.shown for one in figures)])
    return _lines(lines)


def failures(sheet: Sheet) -> str:
    """What could not be measured, and why."""
    found = [
        f"- {name_of(row)}, {column}: {reason}"
        for row in sheet.rows
        for column, one in sheet.columns.items()
        if (reason := sheet.records.failure(row, column, one["data"]))
    ]
    return "Could not be measured:\n\n" + "\n".join(found) if found else ""


def summary(records: Records) -> list[dict[str, Any]]:
    """Every row with its figures, for a JSON file."""
    sheet = Sheet(records)
    found = []
    for row in sheet.rows:
        figures = {
            f"{column}.{name}": sheet.mean(row, column, name)
            for column in sheet.columns
            for name in sorted({key for one in sheet.values(row, column) for key in one})
        }
        growth = sheet.growth(row) if sheet.texts else None
        found.append(row | {"growth": growth, "over": sheet.is_over(row), **figures})
    return found


def _lines(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
