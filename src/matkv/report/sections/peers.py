"""Other methods at their bytes, beside this one, from one run on the same model and text.

Bytes are those that grow with the context, over the tokens held: `bytes_per_token` of a row.
Projections, held once, are in `budget` alone.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence

from matkv.artifact.records import Record
from matkv.report.page import Block, Cell, Missing, Table, Text
from matkv.report.pictures.figures import Axis, Line, lines
from matkv.report.pictures.theme import Picture
from matkv.report.rows import Peer, Source, read
from matkv.report.runs import Run, percent
from matkv.report.sections.quality import CUT, PANELS, perplexity_cell, perplexity_panel

Size = Callable[[Peer], float]
COMMAND = "python -m benchmarks.peers --artifact RUN --out RUN/results/peers.json"
# Bytes this close are equal, and so are losses within so many standard errors.
SLACK, ERRORS = 1.01, 2.0
EXACT = re.compile(r"(?:first \d+(?: and last \d+)?|last \d+) exact")
NOTE = (
    "Bold: nothing measured here has a lower perplexity at as few bytes. Bytes a token: what grows "
    "with the context; all bytes: with projections, for one sequence of the length measured."
)


def peer_blocks(runs: Sequence[Run]) -> list[Block]:
    """Every method's perplexity against its bytes, and who is best where."""
    found: dict[Source, list[Peer]] = {}
    for run in runs:
        for row in run.read(Peer):
            found.setdefault(row.source, []).append(row)
    if not found:
        return [Missing("No other method was measured at equal bytes yet:", COMMAND)]
    groups = sorted(found.items(), key=lambda item: (-len(item[1]), str(item[0])))
    blocks: list[Block] = [_picture(groups[:PANELS])]
    for index, (source, its) in enumerate(groups):
        chosen = [row for method in methods(its) for row in front(_of(its, method))]
        chosen += [row for row in its if row.is_full][:1]
        blocks += [Text(line) for line in verdicts(its)] if index == 0 else []
        blocks.append(_table(f"Methods by bytes, on {source}", chosen, its, folded=index > 0))
        if len(chosen) < len(its):
            blocks.append(_table(f"All settings, on {source}", its, its, folded=True))
    failed = [_failed(row) for run in runs for row in run.rows[Peer.kind] if not read(Peer, [row])]
    if failed:
        blocks.append(Text(f"Could not be measured: {', '.join(failed)}."))
    return blocks


def _failed(row: Record) -> str:
    return " ".join(str(row[name]) for name in ("method", "setting") if row.get(name)) or "unnamed"


def methods(rows: Sequence[Peer]) -> list[str]:
    """The methods beside the full cache, ours first."""
    names = {row.method: not row.is_ours for row in rows if not row.is_full}
    return sorted(names, key=lambda name: (names[name], len(name) if not names[name] else 0))


def growing(row: Peer) -> float:
    """Bytes that grow with the context, over its tokens."""
    return row.bytes_per_token


def everything(row: Peer) -> float:
    """All bytes at the measured length, projections included, over the full cache's."""
    return math.inf if row.budget is None else row.budget


def front(rows: Sequence[Peer], size: Size = growing) -> list[Peer]:
    """Of some rows those that no other beats at as few bytes, by falling bytes."""
    best, kept = math.inf, []
    for row in sorted(rows, key=lambda row: (size(row), row.perplexity)):
        if row.perplexity < best:
            best = row.perplexity
            kept.append(row)
    return kept[::-1]


def verdicts(rows: Sequence[Peer]) -> list[str]:
    """The verdict by the bytes that grow with the context, then by all where every row has them."""
    found = [verdict(rows)]
    if any(row.is_ours for row in rows) and all(row.budget is not None for row in rows):
        every = verdict(rows, everything)
        found.append(f"With projections, for one sequence of the length measured: {every}")
    return found


def verdict(rows: Sequence[Peer], size: Size = growing) -> str:
    """Where matkv is the best at its bytes, and where which other method is better."""
    others = [row for row in rows if not row.is_ours and not row.is_full]
    wins, losses = [], []
    for row in front([row for row in rows if row.is_ours], size):
        fitting = [one for one in others if size(one) <= SLACK * size(row)]
        best = min(fitting, key=lambda one: one.perplexity, default=None)
        if best is not None and _better(best, row):
            losses.append(f"{row.name} ({best.name})")
        else:
            wins.append(row.name)
    if not wins and not losses:
        return "matkv itself is not among these rows."
    parts = [f"Nothing else is better at as few bytes as {_listed(wins)}."] if wins else []
    if losses:
        parts.append(f"Better at no more bytes, in brackets: {_listed(losses)}.")
    return " ".join([*parts, "Losses within two standard errors count as equal."])


def _better(row: Peer, other: Peer) -> bool:
    """Whether a row loses less than another, by more than chance where both tell every window."""
    if row.perplexity >= other.perplexity:
        return False
    if len(row.losses) != len(other.losses) or len(row.losses) < 2:
        return True
    apart = [b - a for a, b in zip(row.losses, other.losses, strict=True)]
    error = statistics.stdev(apart) / math.sqrt(len(apart))
    return statistics.fmean(apart) > ERRORS * error


def _of(rows: Sequence[Peer], method: str) -> list[Peer]:
    return [row for row in rows if row.method == method and not row.is_full]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _picture(groups: Sequence[tuple[Source, Sequence[Peer]]]) -> Picture:
    """A line a method through the settings that none of its own beats."""
    every = [row for _, rows in groups for row in rows]
    names = methods(every)
    labels = {
        name: name + exactness([row for _, rows in groups for row in front(_of(rows, name))])
        for name in names
    }
    panels = []
    for source, rows in groups:
        full = next((row for row in rows if row.is_full), None)
        drawn = [
            _line(labels[name], front(_of(rows, name)), full, style)
            for style, name in enumerate(names)
        ]
        x = Axis(label="cache bytes a token, projections left out")
        panels.append(perplexity_panel(str(source), x, drawn, full))
    return lines(
        "peers",
        panels,
        text="Perplexity against cache bytes a token for every method measured in one run.",
        caption="Lower and further left is better; of each method the settings that none of its "
        "own beats. All in one run on the same model and text. Bytes are those that grow with the "
        "context, over the tokens held: codes, scales, zero points and exact tokens are counted; "
        "projections, held once whatever the context, are not. "
        + (CUT if any(panel.y.span for panel in panels) else ""),
    )


def exactness(rows: Sequence[Peer]) -> str:
    """Which tokens some settings of ours keep exact, as a part of a label; nothing where none."""
    found = [match[0] if (match := EXACT.search(row.setting)) else "" for row in rows]
    kinds = sorted({one for one in found if one})
    if not kinds:
        return ""
    some = "" if all(found) else "some settings "
    return f", {some}{' or '.join(kinds)}"


def _line(label: str, rows: Sequence[Peer], full: Peer | None, style: int) -> Line:
    """Plain matkv, the first, is drawn stronger, its points with what they keep of all bytes."""
    leads = style == 0 and any(row.is_ours for row in rows)
    shares = [round(growing(row) / growing(full), 3) for row in rows] if leads and full else []
    return Line(
        label=label,
        points=[(growing(row), row.perplexity) for row in rows],
        bounds=[row.spread for row in rows],
        labels=list(map(percent, shares)),
        strong=leads,
        style=style,
        dash=int(any(EXACT.search(row.setting) for row in rows)),
    )


def _table(caption: str, shown: Sequence[Peer], rows: Sequence[Peer], *, folded: bool) -> Table:
    full = next((row for row in rows if row.is_full), None)
    best = {id(row) for row in front([row for row in rows if not row.is_full])}
    body = [
        _cells(row, full, best=id(row) in best)
        for row in sorted(shown, key=lambda row: (-growing(row), row.perplexity))
    ]
    return Table(
        header=(
            "method",
            "setting",
            "bytes a\ntoken",
            "of full",
            "all bytes\nof full",
            "perplexity",
            "× full",
            "note",
        ),
        rows=body,
        caption=caption,
        notes=(NOTE,),
        folded=folded,
        words=(1, 7),
    )


def _cells(row: Peer, full: Peer | None, *, best: bool) -> list[Cell]:
    return [
        Cell(row.method),
        Cell(row.setting),
        Cell(f"{growing(row):,.0f}"),
        Cell("" if full is None else f"{growing(row) / growing(full):.1%}"),
        Cell("" if row.budget is None else f"{row.budget:.1%}"),
        perplexity_cell(row, best=best),
        Cell("" if full is None else f"{row.perplexity / full.perplexity:,.3f}"),
        Cell(row.note),
    ]
