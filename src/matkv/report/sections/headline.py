"""What the reader should know first: which budget gives what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matkv.artifact.setting import Setting, staying_text
from matkv.report.page import Headline, Tile
from matkv.report.rows import Measured, Timed
from matkv.report.runs import Run, line_name, percent
from matkv.report.sections.accuracy import full_of, retention, scores, task_names
from matkv.report.sections.made import stale_note
from matkv.report.sections.quality import Curve, curves, full_row, sources

# A loss that many users accept without looking twice: the smallest budget within it leads.
TOLERANCE = 1.1


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The budget that leads the report: its row, its curve, and the full cache's row."""

    row: Measured
    curve: Curve
    full: Measured

    @property
    def factor(self) -> float:
        return self.row.perplexity / self.full.perplexity


def choose(runs: Sequence[Run]) -> Choice | None:
    """The smallest budget within the tolerance, or else the one that loses least.

    Of several runs at that budget the one with the lowest perplexity; exact tokens count only where
    there is nothing else, since their bytes are not in a share.
    """
    for source in sources(runs)[:1]:
        full = full_row(runs, source)
        if full is None:
            return None
        found = [
            Choice(row=row, curve=curve, full=full)
            for curve in curves(runs, source)
            for row in curve.rows
            if row.share < 1
        ]
        plain = [one for one in found if not one.curve.way.sink and not one.curve.way.recent]
        fine = [one for one in plain or found if one.factor <= TOLERANCE]
        if fine:
            return min(fine, key=lambda one: (round(one.row.share, 4), one.factor))
        return min(plain or found, key=lambda one: one.factor, default=None)
    return None


def headline(runs: Sequence[Run]) -> Headline:
    """One sentence and a few numbers, computed from the rows."""
    model, choice = runs[0].model, choose(runs)
    notes = [note for run in runs if (note := stale_note(run)) is not None]
    first = runs[0].artifact
    staying = staying_text(first, [Setting(budget=one) for one in sorted(first.tables)[::-1]])
    notes += [] if staying is None else [f"{staying}."]
    title = f"{model}: the KV cache at every budget"
    if choice is None:
        shape = runs[0].artifact.geometry
        sentence = (
            f"Bases for {len(shape.compressed)} layers of {model}. Nothing was measured of them "
            "yet: each section names the command that fills it."
        )
        return Headline(title=title, sentence=sentence, notes=notes)
    return Headline(
        title=title, sentence=_sentence(runs, choice), tiles=_tiles(runs, choice), notes=notes
    )


def _name(runs: Sequence[Run], choice: Choice) -> str:
    parts = [choice.curve.run.name if len(runs) > 1 else "", str(choice.curve.way)]
    return ", ".join(part for part in parts if part)


def _sentence(runs: Sequence[Run], choice: Choice) -> str:
    before, after = choice.full.perplexity, choice.row.perplexity
    which = _name(runs, choice)
    with_ = f" ({which})" if which else ""
    text = (
        f"With {percent(choice.row.share)} of {_bytes(choice)}{with_}, perplexity on "
        f"{choice.row.text_name} goes from {before:,.2f} to {after:,.2f}, "
        f"{choice.factor - 1:+.1%}"
    )
    accuracy = _accuracy(runs, choice)
    if accuracy is not None:
        share, tasks = accuracy
        names = f"{tasks} tasks" if tasks > 1 else "one task"
        text += f", and {share:.1%} of the average accuracy over {names} is kept"
    if choice.factor > TOLERANCE:
        text += f". No measured budget stays within {TOLERANCE - 1:.0%} of the full cache"
    return text + "."


def _bytes(choice: Choice) -> str:
    """What the share is of, which is not all bytes where layers stay as they are."""
    if not choice.curve.run.artifact.geometry.staying:
        return "the cache's bytes"
    held = choice.row.held
    return "the bytes that grow" + ("" if held is None else f", {held:.1%} of the whole cache's")


def _accuracy(runs: Sequence[Run], choice: Choice) -> tuple[float, int] | None:
    tasks, found = task_names(runs), scores(runs)
    full, budget = full_of(found), choice.row.budget
    name = line_name(choice.curve.run, runs, choice.curve.way)
    ours = next((one for one in found if (one.run, one.budget) == (name, budget)), None)
    if ours is None or full is None:
        return None
    share = retention(ours.average(tasks), full.average(tasks))
    return None if share is None else (share, len(tasks))


def _tiles(runs: Sequence[Run], choice: Choice) -> list[Tile]:
    tiles = []
    full, size = choice.full.bytes_per_token, choice.row.bytes_per_token
    if full is not None and size is not None:
        tiles.append(Tile("bytes a token", f"{size:,.0f}", f"of cache, {full:,.0f} before"))
    before, after = choice.full.perplexity, choice.row.perplexity
    tiles.append(Tile("perplexity", f"{after:,.2f}", f"{before:,.2f} with the full cache"))
    accuracy = _accuracy(runs, choice)
    if accuracy is not None:
        tiles.append(Tile("accuracy kept", f"{accuracy[0]:.1%}", f"average of {accuracy[1]} tasks"))
    speed = _speed(choice)
    if speed is not None:
        context, factor = speed
        tiles.append(
            Tile("decoding", f"{factor:.2f}×", f"DynamicCache's speed at {context:,.0f} tokens")
        )
    return tiles


def _speed(choice: Choice) -> tuple[float, float] | None:
    """Speedup over DynamicCache at the longest context that was timed with this budget."""
    rows = choice.curve.run.read(Timed)
    timed = [
        (row.context, row.speedup)
        for row in rows
        if row.budget == choice.row.budget and row.speedup is not None
    ]
    return max(timed, key=lambda one: one[0], default=None)
