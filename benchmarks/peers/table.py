"""The rows that are kept, and the Markdown tables made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from matkv.artifact.results import Kind

from .protocol import Row, summary

# What tells two measurements apart; a row replaces an older one that is equal in all of these.
TASK = ("model", "dtype", "text", "windows", "length", "prefill", "chunk")
PEERS = Kind("peers", (*TASK, "method", "setting", "artifact", "calibrated_on"))
LEVELS = (0.75, 0.5, 0.375, 0.35, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1)
OURS = ("matkv", "matkv + quantization")


def is_finished(row: Row) -> bool:
    """Whether it holds a figure; what failed is tried again."""
    return row.get("perplexity") is not None


# ---- who wins


@dataclass(frozen=True)
class Side:
    """The best row of one kind within a level, and what it saves in mean loss over the best peer.

    `gain` is below 0 where the peer is better; `stderr` is its standard error over windows, both
    scored on the same ones. Without a peer both are missing.
    """

    row: Row
    gain: float | None = None
    stderr: float | None = None


@dataclass(frozen=True)
class Level:
    """The best of the peers and of matkv's kinds within a number of bytes, where there is any."""

    budget: float
    peer: Row | None
    ours: dict[str, Side]

    @property
    def winner(self) -> str:
        """Who has the lowest perplexity; `even` within two standard errors of the best peer."""
        best = min(self.ours.values(), key=lambda side: side.row["perplexity"], default=None)
        if best is None:
            return self.peer["method"] if self.peer else "nobody"
        if self.peer is None or best.gain is None:
            return str(best.row["family"])
        if best.stderr is None or abs(best.gain) < 2 * best.stderr:
            return "even"
        return str(best.row["family"] if best.gain > 0 else self.peer["method"])


def level(rows: Sequence[Row], budget: float, measure: str = "budget") -> Level:
    """Compare the best rows whose `measure`, `budget` or `growing_budget`, is within `budget`."""
    fitting = [row for row in rows if is_finished(row) and row[measure] <= budget + 1e-9]
    peer = _best(row for row in fitting if row["family"] not in (*OURS, "full"))
    ours = {}
    for family in OURS:
        best = _best(row for row in fitting if row["family"] == family)
        if best is not None:
            ours[family] = Side(best, *(difference(peer, best) if peer else (None, None)))
    return Level(budget, peer, ours)


def difference(row: Row, other: Row) -> tuple[float, float | None]:
    """Mean loss of `row` less that of `other`, and its standard error, window by window."""
    pairs = zip(row["losses"], other["losses"], strict=True)
    apart = [one - two for one, two in pairs]
    stderr: float | None = summary(apart)["stderr"]
    return math.fsum(apart) / len(apart), stderr


def front(rows: Sequence[Row], measure: str = "budget") -> set[str]:
    """Keys of the rows that no row with as few bytes beats in perplexity."""
    ordered = sorted(
        (row for row in rows if is_finished(row)),
        key=lambda row: (row[measure], row["perplexity"]),
    )
    best, keys = math.inf, set()
    for row in ordered:
        if row["perplexity"] < best:
            best = row["perplexity"]
            keys.add(PEERS.key(row))
    return keys


def _best(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: float(row["perplexity"]), default=None)


# ---- Markdown


def markdown(rows: Sequence[Row]) -> str:
    """All rows, a section for each model, text and protocol they were scored with."""

    def task(row: Row) -> list[str]:
        return [str(row.get(name)) for name in TASK]

    sections = [list(group) for _, group in groupby(sorted(rows, key=task), key=task)]
    return "\n\n".join(_section(group) for group in sections)


def _section(rows: list[Row]) -> str:
    first, made = rows[0], rows[-1].get("made", {})
    title = (
        f"{first.get('model')} ({first.get('dtype')}), {first.get('windows')} windows of "
        f"{first.get('length')} tokens of {first.get('text')}: {first.get('prefill')} read, the "
        f"rest scored in chunks of {first.get('chunk')}; {made.get('hardware')}, "
        f"{made.get('date')}"
    )
    tables = [_all_rows(rows)]
    for measure, name in (
        ("budget", "all resident bytes, projections included"),
        ("growing_budget", "bytes that grow with the context, projections left out"),
    ):
        tables.append(f"Who wins at each level, {name}:\n\n{_levels(rows, measure)}")
    return "\n\n".join([title, *tables])


def _all_rows(rows: list[Row]) -> str:
    """Every row by falling bytes; ● where no row with as few bytes is better."""
    marked = front(rows)
    full = next((row for row in rows if row["method"] == "full cache" and is_finished(row)), None)
    lines = [
        "| method | setting | budget | without projections | bytes/token | perplexity | "
        "loss over full | best | s/window | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    done = sorted((row for row in rows if is_finished(row)), key=lambda row: -row["budget"])
    for row in done:
        cells = [
            row["method"],
            row["setting"],
            f"{row['budget']:.3f}",
            f"{row['growing_budget']:.3f}",
            f"{row['bytes_per_token']:,.0f}",
            f"{row['perplexity']:.2f}",
            _plus_minus(*difference(row, full)) if full else "",
            "●" if PEERS.key(row) in marked else "",
            f"{row['seconds_per_window']:.2f}",
            row["note"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        if not is_finished(row):
            lines.append(f"| {row['method']} | {row['setting']} |{' |' * 7} {row['note']} |")
    return "\n".join(lines)


def _levels(rows: list[Row], measure: str) -> str:
    lines = [
        "| at most | best peer | perplexity | "
        + " | ".join(f"{family} | perplexity | gain in loss over the peer" for family in OURS)
        + " | winner |",
        "|---|---|---|" + "---|---|---|" * len(OURS) + "---|",
    ]
    for budget in LEVELS:
        found = level(rows, budget, measure)
        cells = [f"{budget:.1%}", *_cells(found.peer, measure)]
        for family in OURS:
            side = found.ours.get(family)
            cells += _cells(side.row if side else None, measure)
            cells.append(_plus_minus(side.gain, side.stderr) if side else "")
        lines.append("| " + " | ".join([*cells, f"**{found.winner}**"]) + " |")
    return "\n".join(lines)


def _cells(row: Row | None, measure: str) -> list[str]:
    return [_name(row, measure), f"{row['perplexity']:.2f}"] if row else ["none", ""]


def _name(row: Row, measure: str) -> str:
    setting = f", {row['setting']}" if row["setting"] else ""
    return f"{row['method']}{setting} ({row[measure]:.3f})"


def _plus_minus(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:+.3f}" if stderr is None else f"{value:+.3f} ± {stderr:.3f}"
