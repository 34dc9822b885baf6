"""Other methods at their bytes, beside this one, from one run on the same model and text.

Bytes are those that grow with the context, over the tokens held: `bytes_per_token` of a row, which
is `growing_budget` of the full cache's. Projections, held once, are in `budget` alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from matkv.artifact.records import Record
from matkv.report.page import Block, Cell, Missing, Table, Text
from matkv.report.pictures.figures import Axis, Line, Panel, lines
from matkv.report.pictures.theme import Picture
from matkv.report.runs import Run, amount, having, number, percent
from matkv.report.sections.quality import CUT, PANELS, Source, readable, source_of, spread

Size = Callable[[Record], float]
COMMAND = "python -m benchmarks.peers --artifact RUN --out RUN/results/peers.json"
# Bytes this close are equal, and so are losses within so many standard errors.
SLACK, ERRORS = 1.01, 2.0
NOTE = (
    "Bold: nothing measured here has a lower perplexity at as few bytes. Bytes a token: what grows "
    "with the context; all bytes: with projections, for one sequence of the length measured."
)


def peer_blocks(runs: Sequence[Run]) -> list[Block]:
    """Every method's perplexity against its bytes, and who is best where."""
    rows = [row for run in runs for row in run.rows["peers"]]
    found: dict[Source, list[Record]] = {}
    for row in having(rows, "perplexity", "bytes_per_token"):
        found.setdefault(source_of(row), []).append(row)
    if not found:
        return [Missing("No other method was measured at equal bytes yet:", COMMAND)]
    groups = sorted(found.items(), key=lambda item: (-len(item[1]), str(item[0])))
    blocks: list[Block] = [_picture(groups[:PANELS])]
    for index, (source, its) in enumerate(groups):
        chosen = [row for method in methods(its) for row in front(_of(its, method))]
        chosen += [row for row in its if is_full(row)][:1]
        blocks += [Text(line) for line in verdicts(its)] if index == 0 else []
        blocks.append(_table(f"Methods by bytes, on {source}", chosen, its, folded=index > 0))
        if len(chosen) < len(its):
            blocks.append(_table(f"All settings, on {source}", its, its, folded=True))
    failed = [_name(row) for row in rows if number(row, "perplexity") is None]
    if failed:
        blocks.append(Text(f"Could not be measured: {', '.join(failed)}."))
    return blocks


def is_full(row: Record) -> bool:
    """Whether a row is the full cache, in whatever environment."""
    return str(row.get("family")) == "full" or _method(row).startswith("full")


def is_ours(row: Record) -> bool:
    """Whether a row is of matkv."""
    return str(row.get("family", "")).startswith("matkv") or _method(row).startswith("matkv")


def methods(rows: Sequence[Record]) -> list[str]:
    """The methods beside the full cache, ours first."""
    names = {_method(row): not is_ours(row) for row in rows if not is_full(row)}
    return sorted(names, key=lambda name: (names[name], len(name) if not names[name] else 0))


def front(rows: Sequence[Record], size: Size | None = None) -> list[Record]:
    """Of some rows those that no other beats at as few bytes, by falling bytes."""
    size, best, kept = size or _size, math.inf, []
    for row in sorted(rows, key=lambda row: (size(row), _loss(row))):
        if _loss(row) < best:
            best = _loss(row)
            kept.append(row)
    return kept[::-1]


def verdicts(rows: Sequence[Record]) -> list[str]:
    """The verdict by the bytes that grow with the context, then by all where every row has them."""
    found = [verdict(rows)]
    if any(map(is_ours, rows)) and len(having(rows, "budget")) == len(rows):
        every = verdict(rows, _all_bytes)
        found.append(f"With projections, for one sequence of the length measured: {every}")
    return found


def verdict(rows: Sequence[Record], size: Size | None = None) -> str:
    """Where matkv is the best at its bytes, and where which other method is better."""
    size = size or _size
    others = [row for row in rows if not is_ours(row) and not is_full(row)]
    wins, losses = [], []
    for row in front([row for row in rows if is_ours(row)], size):
        fitting = [one for one in others if size(one) <= SLACK * size(row)]
        best = min(fitting, key=_loss, default=None)
        if best is not None and _better(best, row):
            losses.append(f"{_name(row)} ({_name(best)})")
        else:
            wins.append(_name(row))
    if not wins and not losses:
        return "matkv itself is not among these rows."
    parts = [f"Nothing else is better at as few bytes as {_listed(wins)}."] if wins else []
    if losses:
        parts.append(f"Better at no more bytes, in brackets: {_listed(losses)}.")
    return " ".join([*parts, "Losses within two standard errors count as equal."])


def _better(row: Record, other: Record) -> bool:
    """Whether a row loses less than another, by more than chance where both tell every window."""
    if _loss(row) >= _loss(other):
        return False
    ours, theirs = row.get("losses"), other.get("losses")
    if not isinstance(ours, list) or not isinstance(theirs, list) or len(ours) != len(theirs):
        return True
    apart: list[float] = [b - a for a, b in zip(ours, theirs, strict=True)]
    if len(apart) < 2:
        return True
    error = statistics.stdev(apart) / math.sqrt(len(apart))
    return statistics.fmean(apart) > ERRORS * error


def _of(rows: Sequence[Record], method: str) -> list[Record]:
    return [row for row in rows if _method(row) == method and not is_full(row)]


def _method(row: Record) -> str:
    return str(row.get("method", "unnamed"))


def _size(row: Record) -> float:
    """Bytes that grow with the context, over its tokens."""
    return number(row, "bytes_per_token") or 0.0


def _all_bytes(row: Record) -> float:
    """All bytes at the measured length, projections included, over the full cache's."""
    return number(row, "budget") or 0.0


def _loss(row: Record) -> float:
    return number(row, "perplexity") or 0.0


def _setting(row: Record) -> str:
    setting, budget = row.get("setting"), number(row, "growing_budget")
    return str(setting) if setting is not None else "" if budget is None else percent(budget)


def _name(row: Record) -> str:
    return f"{_method(row)} {_setting(row)}".strip()


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _picture(groups: Sequence[tuple[Source, Sequence[Record]]]) -> Picture:
    """A line a method through the settings that none of its own beats."""
    names = methods([row for _, rows in groups for row in rows])
    panels = []
    for source, rows in groups:
        full = next((row for row in rows if is_full(row)), None)
        values = [_loss(row) for row in rows]
        drawn = [_line(name, front(_of(rows, name)), full, names) for name in names]
        panels.append(
            Panel(
                title=str(source),
                x=Axis(label="cache bytes a token, projections left out"),
                y=Axis(
                    label="perplexity",
                    log=True,
                    span=readable(values, _loss(full) if full else None),
                ),
                lines=[line for line in drawn if line.points],
                levels=[(_loss(full), f"full cache {_loss(full):.2f}")] if full else [],
            )
        )
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


def _line(name: str, rows: Sequence[Record], full: Record | None, names: Sequence[str]) -> Line:
    """Plain matkv is drawn stronger, its points with what they keep of the full cache."""
    leads = name == names[0] and any(map(is_ours, rows))
    shares = [percent(round(_size(row) / _size(full), 3)) for row in rows] if leads and full else []
    style = names.index(name)
    return Line(
        label=name,
        points=[(_size(row), _loss(row)) for row in rows],
        bounds=[spread(row) for row in rows],
        labels=shares,
        strong=leads,
        style=style,
        dashed=style >= 8,
    )


def _table(caption: str, shown: Sequence[Record], rows: Sequence[Record], *, folded: bool) -> Table:
    full = next((row for row in rows if is_full(row)), None)
    best = {id(row) for row in front([row for row in rows if not is_full(row)])}
    body = [
        _cells(row, full, best=id(row) in best)
        for row in sorted(shown, key=lambda row: (-_size(row), _loss(row)))
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


def _cells(row: Record, full: Record | None, *, best: bool) -> list[Cell]:
    error, every = number(row, "stderr"), number(row, "budget")
    return [
        Cell(_method(row)),
        Cell(_setting(row)),
        Cell(f"{_size(row):,.0f}"),
        Cell("" if full is None else f"{_size(row) / _size(full):.1%}"),
        Cell("" if every is None else f"{every:.1%}"),
        Cell(amount(_loss(row)), "" if error is None else f"±{amount(_loss(row) * error)}", best),
        Cell("" if full is None else f"{_loss(row) / _loss(full):,.3f}"),
        Cell(str(row.get("note") or "")),
    ]
