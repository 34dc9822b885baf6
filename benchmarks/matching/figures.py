"""The columns of the table: what a cell shows of a row, and what it is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .records import Json
from .sheet import FOOTPRINT, Apart, Sheet

NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A cell: what is shown, and its worth if it takes part in who is best; more is better."""

    shown: str = NONE
    worth: float | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a budget's tables.

    `name` is its name where it stands alone; `items` are a row's worths, item by item, none where
    there is but one measurement.
    """

    name: str
    title: str
    figure: Callable[[Json], Figure]
    items: Callable[[Json], list[float]] = lambda row: []


def signed(found: Apart | None, scale: float = 1, digits: int = 3) -> str:
    """A difference with its error, in brackets."""
    if found is None:
        return ""
    mean, error = (scale * one for one in found)
    plus = "" if math.isnan(error) else f" ± {error:.{digits}f}"
    return f" ({mean:+.{digits}f}{plus})"


# ---- loss of a text


def text_columns(sheet: Sheet) -> list[Column]:
    """Perplexity, divergence and agreement on every text."""
    found = []
    for text in sheet.texts:
        found += [
            Column(
                name=f"{text}: perplexity",
                title=f"{text}: perplexity (nats over full)",
                figure=perplexity(sheet, text),
                items=items_of(sheet, [text], "loss", -1),
            ),
            Column(
                name=f"{text}: KL",
                title="KL",
                figure=spread_of(sheet, text, "kl", 1, -1),
                items=items_of(sheet, [text], "kl", -1),
            ),
            Column(
                name=f"{text}: same next token",
                title="same next token, %",
                figure=spread_of(sheet, text, "agree", 100, 1),
                items=items_of(sheet, [text], "agree", 1),
            ),
        ]
    return found


def perplexity(sheet: Sheet, column: str) -> Callable[[Json], Figure]:
    """Over all items of the full cache, as far as the paired difference says."""

    def figure(row: Json) -> Figure:
        apart = sheet.difference(row, column, "loss")
        if apart is None or sheet.full is None:
            return Figure()
        mean = (sheet.mean(sheet.full, column, "loss") or 0) + apart[0]
        shown = f"{math.exp(mean):.2f}" if mean < 7 else f"{math.exp(mean):.0f}"
        return Figure(shown=shown + ("" if row is sheet.full else signed(apart)), worth=-mean)

    return figure


def spread_of(
    sheet: Sheet, column: str, name: str, scale: float, sign: int
) -> Callable[[Json], Figure]:
    """A mean with its error; `sign` is -1 where less is better."""
    digits = 1 if scale > 1 else 3

    def figure(row: Json) -> Figure:
        found = sheet.spread(row, column, name)
        if found is None:
            return Figure()
        mean, error = found
        is_known = row is not sheet.full and not math.isnan(error)
        plus = f" ± {scale * error:.{digits}f}" if is_known else ""
        return Figure(shown=f"{scale * mean:.{digits}f}{plus}", worth=sign * mean)

    return figure


def items_of(
    sheet: Sheet, columns: Sequence[str], name: str, sign: int
) -> Callable[[Json], list[float]]:
    return lambda row: [sign * one for one in sheet.items(row, columns, name)]


# ---- questions


def question_columns(sheet: Sheet) -> list[Column]:
    """What is found in haystacks, and the tasks: right answers, and the loss of the right one."""
    found = []
    for test in sheet.retrievals:
        found.append(
            Column(
                name=test,
                title=f"{test}: found, loss of the answer",
                figure=found_answers(sheet, test),
                items=items_of(sheet, [test], "loss", -1),
            )
        )
    if sheet.tasks:
        count = f"{len(sheet.tasks)} tasks"
        found += [
            Column(
                name=f"{count}: right answers",
                title=f"{count}, % right (points over full)",
                figure=averaged(sheet, sheet.tasks, "right", 100, 1),
                items=items_of(sheet, sheet.tasks, "right", 1),
            ),
            Column(
                name=f"{count}: loss of the right answer",
                title="loss of the right answer",
                figure=averaged(sheet, sheet.tasks, "loss", 1, -1),
                items=items_of(sheet, sheet.tasks, "loss", -1),
            ),
        ]
    return found


def found_answers(sheet: Sheet, column: str) -> Callable[[Json], Figure]:
    """Right answers, and the loss of the right one, which tells rows apart that find as many."""

    def figure(row: Json) -> Figure:
        values = sheet.values(row, column)
        if not values:
            return Figure()
        right, loss = sum(one["right"] for one in values), sheet.mean(row, column, "loss")
        assert loss is not None
        apart = "" if row is sheet.full else signed(sheet.difference(row, column, "loss"), digits=2)
        shown = f"{right}/{len(values)}, {loss:.2f}{apart}"
        return Figure(shown=shown, worth=right / len(values) - 1e-3 * loss)

    return figure


def averaged(
    sheet: Sheet, tasks: Sequence[str], name: str, scale: float, sign: int
) -> Callable[[Json], Figure]:
    """The average of tasks, and its difference to the full cache's."""
    digits = 1 if scale > 1 else 3

    def figure(row: Json) -> Figure:
        found = sheet.average(row, tasks, name)
        if found is None:
            return Figure()
        mean, apart = found
        shown = f"{scale * mean:.{digits}f}"
        if row is not sheet.full:
            shown += signed(apart, scale, digits)
        return Figure(shown=shown, worth=sign * mean)

    return figure


# ---- memory and time


def cost_columns(sheet: Sheet) -> list[Column]:
    """Peak memory of a prompt, time to its first token, and tokens a second behind it."""
    if FOOTPRINT not in sheet.columns:
        return []
    return [
        Column(name="peak of a prompt", title="peak of a prompt, MiB", figure=peak(sheet)),
        Column(
            name="first token", title="first token, ms", figure=speed(sheet, "first_token")
        ),
        Column(name="tokens/s", title="tokens/s", figure=speed(sheet, "step")),
    ]  # fmt: skip


def peak(sheet: Sheet) -> Callable[[Json], Figure]:
    def figure(row: Json) -> Figure:
        mean = sheet.mean(row, FOOTPRINT, "prompt_peak_bytes")
        return Figure() if mean is None else Figure(shown=f"{mean / 2**20:.0f}", worth=-mean)

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
