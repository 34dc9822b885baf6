"""What is said beside the tables: on what and where, how many items, and what they can show."""

from __future__ import annotations

import math
import statistics

from matkv.artifact.records import Record

from .sheet import FOOTPRINT, Sheet, apart

# Rows that a budget cannot have, and why.
ABSENT = (
    "QuantizedCache at 12.5% and 6.25%: its backends have no fewer than 2 bits, 15.6% with a scale "
    "and a zero point for 64 numbers",
    "kvpress at 12.5% and 6.25%: it keeps everything after the context, which alone is 16% of what "
    "a window holds on average",
    "TurboQuant style and integers at 6.25%: one bit a number is 6.25% without any scale or norm",
)
POINT = 0.01


def head(sheet: Sheet) -> str:
    """On what, where and when; how many items, and how to read the tables."""
    row, made = sheet.rows[0], sheet.records.made
    last: Record = made[-1] if made else {}
    versions = ", ".join(f"{name} {its}" for name, its in last.get("versions", {}).items())
    parts = [
        f"{row['model']} in {row['dtype']}; {last.get('hardware')}; {versions}; "
        f"{last.get('date')}. {counts(sheet)}",
        "Behind ± one standard error, of differences to the full cache item by item. The best "
        "figure within the budget is bold, ours or another's; † counts bytes by its format, as it "
        "is simulated; ‡ is over the budget and takes no part. Bytes: resident memory that a "
        "further token adds, and what is held of a window of text, exact tokens included; both "
        f"over the full cache in {row['dtype']}. Even: within two paired standard errors.",
        questions(sheet),
        "Not there: " + "; ".join(ABSENT) + ".",
    ]
    return "\n\n".join(part for part in parts if part)


def counts(sheet: Sheet) -> str:
    """Items that the full cache was asked, and that a row was asked at least."""
    told = []
    for name in sheet.columns:
        if name == FOOTPRINT:
            continue
        found = [len(values) for row in sheet.rows if (values := sheet.values(row, name))]
        least, most = min(found, default=0), max(found, default=0)
        told.append(f"{name} {most}" + (f" ({least} of some rows)" if least < most else ""))
    return f"Items: {', '.join(told)}."


def questions(sheet: Sheet) -> str:
    """What the full cache can do itself: where that is little, a row has little to lose."""
    assert sheet.full is not None
    told = []
    for test in sheet.retrievals:
        values = sheet.values(sheet.full, test)
        if values:
            right = sum(one["right"] for one in values)
            context = sheet.columns[test].get("context", 0)
            told.append(f"{test} in {context:,} tokens {right} of {len(values)}")
    said = f"The full cache finds: {', '.join(told)}. " if told else ""
    average = sheet.average(sheet.full, sheet.tasks, "right")
    return (said + (_tasks(sheet, average[0]) if average else "")).strip()


def _tasks(sheet: Sheet, right: float) -> str:
    assert sheet.full is not None
    columns = [sheet.columns[task] for task in sheet.tasks]
    chance = statistics.fmean(one.get("chance", 0) for one in columns)
    shots = max(one.get("shots", 0) for one in columns)
    items = sheet.items(sheet.full, sheet.tasks, "right")
    error = math.sqrt(right * (1 - right) / len(items))
    told = (
        f"Behind up to {shots:,} tokens of solved items it has {100 * right:.1f} ± "
        f"{100 * error:.1f}% of {len(items)} items right, where guessing has {100 * chance:.1f}%"
    )
    if right - chance < 2 * error:
        told += ": too near for right answers to tell rows apart"
    told += ". The loss of the right answer tells more."
    needed = items_for_a_point(sheet)
    return told + (f" For one point to be two paired errors it takes {needed:,}." if needed else "")


def items_for_a_point(sheet: Sheet) -> int | None:
    """Items for a point of accuracy to be two paired standard errors, by the median row."""
    assert sheet.full is not None
    base = sheet.items(sheet.full, sheet.tasks, "right")
    found = []
    for row in sheet.rows:
        own = sheet.items(row, sheet.tasks, "right")
        if row is sheet.full or len(own) != len(base) or len(own) < 2:
            continue
        spread = apart([one - other for one, other in zip(own, base, strict=True)])
        assert spread is not None
        found.append((2 * spread[1] / POINT) ** 2 * len(own))
    median = statistics.median(found) if found else 0.0
    return math.ceil(median / 100) * 100 if median else None


def failures(sheet: Sheet) -> str:
    """What could not be measured, and why."""
    found = [
        f"- {row['method']}, {row['setting']}, {column}: {reason}"
        for row in sheet.rows
        for column, one in sheet.columns.items()
        if (reason := sheet.records.failure(row, column, one["data"]))
    ]
    return "Could not be measured:\n\n" + "\n".join(found) if found else ""
