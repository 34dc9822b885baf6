"""Samples of generated text, and how everything in the report was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from matkv.artifact.records import Record
from matkv.report.page import Block, Cell, Facts, Missing, Sample, Section, Table
from matkv.report.rows import Told
from matkv.report.runs import KINDS, Run, as_text, percent, series, title_of

SAMPLES = "matkv report RUN --samples"
# Said elsewhere in the report, or too long to read.
LEFT_OUT = {"stage", "stages", "tables", "schedule", "settings", "made"}


def samples_section(runs: Sequence[Run]) -> Section:
    """Answers to every prompt side by side, the full cache first."""
    answers: dict[str, dict[str, str]] = {}
    for run in runs:
        for one in series([row for row in run.read(Told) if row.prompt]):
            # The full cache is every run's: its first answer stands for all.
            name = percent(None) if one.budget is None else title_of(run, runs, str(one))
            for row in one.rows:
                answers.setdefault(row.prompt, {}).setdefault(name, row.text)
    if not answers:
        return Section("samples", "Generated text", [Missing("No text was kept yet:", SAMPLES)])
    blocks = [Sample(prompt, list(its.items())) for prompt, its in answers.items()]
    return Section("samples", "Generated text", blocks)


def made_section(runs: Sequence[Run]) -> Section:
    """The history of the artifacts, and the commands, machines and versions of every row."""
    blocks: list[Block] = []
    for run in runs:
        blocks += list(_history(run, runs))
    measured = _measured(runs)
    if measured.rows:
        blocks.append(measured)
        blocks += _surroundings(runs)
    blocks += [_stale(run) for run in runs if any(run.stale.values())]
    return Section("made", "How it was made", blocks)


def stale_note(run: Run) -> str | None:
    """How many rows are left out because they are of other bases or ranks."""
    counts = [f"{count} of {kind}" for kind, count in run.stale.items() if count]
    if not counts:
        return None
    return (
        f"{run.name}: {', '.join(counts)} were measured with other bases or ranks than these, and "
        "are left out. Measure again to have them here."
    )


def _stale(run: Run) -> Block:
    return Facts("Left out", [(run.name, stale_note(run) or "")])


def _history(run: Run, runs: Sequence[Run]) -> Iterator[Facts]:
    artifact = run.artifact
    compressed, layers = len(artifact.geometry.compressed), len(artifact.geometry.layers)
    shapes = {(layer.kv_heads, layer.head_dim) for layer in artifact.geometry.layers}
    heads = ", ".join(f"{heads} of dim {dim}" for heads, dim in sorted(shapes))
    items = [
        ("model", run.model),
        ("layers", f"{layers}, {compressed} of them compressed"),
        ("KV heads", f"{heads}; {artifact.geometry.query_heads} query heads"),
        ("bases", run.digest),
    ]
    if artifact.sink or artifact.recent:
        items.append(("kept exact", f"first {artifact.sink}, last {artifact.recent} tokens"))
    yield Facts(title_of(run, runs, "artifact"), items)
    for entry in artifact.history:
        yield Facts(title_of(run, runs, str(entry.get("stage", "stage"))), list(_settings(entry)))


def _settings(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a history entry says, without what other sections show."""
    for name, value in entry.items():
        if name not in LEFT_OUT and value not in (None, "", [], {}):
            yield name.replace("_", " "), as_text(value)
    stages = entry.get("stages")
    for name, spent in stages.items() if isinstance(stages, dict) else ():
        if isinstance(spent, dict):
            yield name, as_text({key: one for key, one in spent.items() if key != "curve"})
    for name in ("settings", "made"):
        value = entry.get(name)
        if isinstance(value, dict):
            kept = {
                key.replace("_", " "): one for key, one in value.items() if one not in (None, [])
            }
            yield name, as_text(kept)


def _all_rows(runs: Sequence[Run]) -> Iterator[tuple[Run, str, Record, dict[str, Any]]]:
    for run in runs:
        for kind in KINDS:
            for row in run.rows[kind]:
                how = row.get("made")
                yield run, kind, row, how if isinstance(how, dict) else {}


def _measured(runs: Sequence[Run]) -> Table:
    """Which command measured what, and when."""
    found: dict[tuple[str, str, str, str], int] = {}
    for run, kind, _, how in _all_rows(runs):
        command, day = str(how.get("command", "not recorded")), str(how.get("date", ""))
        known = {"date", "command", "hardware", "versions"}
        extra = as_text({name: one for name, one in how.items() if name not in known})
        place = (title_of(run, runs, kind), command, day, extra)
        found[place] = found.get(place, 0) + 1
    rows = [
        [Cell(kind), Cell(f"{count:,}"), Cell(day), Cell(extra), Cell(command)]
        for (kind, command, day, extra), count in found.items()
    ]
    return Table(
        header=("measured", "rows", "date", "with", "command"),
        rows=rows,
        caption="Measurements",
        words=(3, 4),
    )


def _surroundings(runs: Sequence[Run]) -> list[Block]:
    """Every combination of hardware and versions that rows were made with."""
    found: dict[str, dict[str, str]] = {}
    for _, _, _, how in _all_rows(runs):
        items = {}
        if how.get("hardware"):
            items["hardware"] = str(how["hardware"])
        versions = how.get("versions")
        if isinstance(versions, dict):
            items["versions"] = as_text(versions)
        if items:
            found[json.dumps(items, sort_keys=True)] = items
    return [Facts("measured on", list(items.items())) for _, items in sorted(found.items())]


def last_date(runs: Sequence[Run]) -> str | None:
    """The day of the newest measurement."""
    return max((str(how["date"]) for *_, how in _all_rows(runs) if how.get("date")), default=None)
