"""The accuracy table in the paper's form, and what is kept of the full cache's average.

The paper's averages are those of its Table 1 (arXiv 2410.14731): six tasks, two models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matkv.report.page import Block, Cell, Missing, Section, Table
from matkv.report.paper import PAPER, PAPER_BUDGETS, PAPER_FULL
from matkv.report.pictures.figures import Axis, Line, Panel, lines
from matkv.report.rows import Scored
from matkv.report.runs import Run, line_name, percent, series

COMMAND = "matkv evaluate RUN --budget 0.75 --budget 0.5 --tasks piqa,arc_easy,hellaswag"
AVERAGES = {"average", "avg", "mean"}
# What guessing scores; a row's own `chance` goes first.
CHANCE = {
    "arc_challenge": 0.25,
    "arc_easy": 0.25,
    "commonsense_qa": 0.2,
    "csqa": 0.2,
    "hellaswag": 0.25,
    "piqa": 0.5,
    "winogrande": 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy in 0..1 with its standard error."""

    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One line of the table: a run at a budget (None for the full cache), its scores by task."""

    run: str
    budget: float | None
    tasks: dict[str, Score]

    def average(self, tasks: Sequence[str]) -> Score | None:
        """Mean over `tasks`, None unless all were measured; errors add up as independent ones."""
        found = [self.tasks[task] for task in tasks if task in self.tasks]
        if not found or len(found) < len(tasks):
            return None
        errors = [score.stderr for score in found if score.stderr is not None]
        total = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
        return Score(value=sum(score.value for score in found) / len(found), stderr=total)


def task_names(runs: Sequence[Run]) -> list[str]:
    """Every task that was scored; averages are computed here."""
    names = sorted({row.task for run in runs for row in run.read(Scored)})
    return [name for name in names if name.lower() not in AVERAGES]


def metric_of(runs: Sequence[Run], task: str) -> str:
    """acc_norm where every row of a task has it, acc otherwise."""
    rows = [row for run in runs for row in run.read(Scored) if row.task == task]
    return "acc_norm" if all(row.acc_norm is not None for row in rows) else "acc"


def scores(runs: Sequence[Run], *, plain: bool = False) -> list[Scores]:
    """Every run, used in every way, by falling budget; `plain` takes acc everywhere."""
    found = []
    for run in runs:
        for one in series(run.read(Scored)):
            name = line_name(run, runs, one.way)
            tasks = _tasks(runs, one.rows, plain)
            found.append(Scores(run=name, budget=one.budget, tasks=tasks))
    return found


def _tasks(runs: Sequence[Run], rows: Sequence[Scored], plain: bool) -> dict[str, Score]:
    found = {}
    for row in rows:
        if row.task.lower() in AVERAGES:
            continue
        score = Score(value=row.acc, stderr=row.stderr)
        if not plain and row.acc_norm is not None and metric_of(runs, row.task) == "acc_norm":
            score = Score(value=row.acc_norm, stderr=row.acc_norm_stderr)
        found[row.task] = score
    return found


def full_of(found: Sequence[Scores]) -> Scores | None:
    """The full cache's line."""
    return next((one for one in found if one.budget is None), None)


def retention(score: Score | None, full: Score | None, chance: float = 0.0) -> float | None:
    """Share of the full cache's accuracy, or of what it has above guessing."""
    if score is None or full is None or full.value - chance <= 0:
        return None
    return (score.value - chance) / (full.value - chance)


def chance_of(runs: Sequence[Run], tasks: Sequence[str]) -> float | None:
    """Mean score of guessing; None where a task's is not known."""
    known = dict(CHANCE)
    for run in runs:
        known |= {row.task: row.chance for row in run.read(Scored) if row.chance is not None}
    values = [known.get(task) for task in tasks]
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found and len(found) == len(tasks) else None


def accuracy_section(runs: Sequence[Run]) -> Section:
    """The table, and what is retained beside the paper."""
    tasks, found = task_names(runs), scores(runs)
    blocks: list[Block] = []
    if not tasks:
        blocks.append(Missing("No task was scored with these bases yet:", COMMAND))
    else:
        blocks.append(_table(runs, found, tasks, plain=False))
        if any(metric_of(runs, task) == "acc_norm" for task in tasks):
            blocks.append(_table(runs, scores(runs, plain=True), tasks, plain=True))
        if full_of(found) is not None:
            blocks += _beside_the_paper(found, tasks)
    return Section("accuracy", "Accuracy", blocks)


def _table(
    runs: Sequence[Run], found: Sequence[Scores], tasks: Sequence[str], *, plain: bool
) -> Table:
    full, chance = full_of(found), chance_of(runs, tasks)
    metrics = ["acc" if plain else metric_of(runs, task) for task in tasks]
    names = [f"{task}\n{metric}" for task, metric in zip(tasks, metrics, strict=True)]
    rows: list[Sequence[Cell]] = [] if full is None else [_row(full, full, tasks, chance)]
    several = len({one.run for one in found}) > 1
    for run in dict.fromkeys(one.run for one in found):
        its = [one for one in found if one.run == run and one.budget is not None]
        if several and its:
            rows.append([Cell(run)])
        rows += [_row(one, full, tasks, chance) for one in its]
    counts = sorted({row.n for run in runs for row in run.read(Scored) if row.n})
    notes = [
        "Accuracy in percent with its standard error; retained: the average over the full cache's."
    ]
    if chance is not None:
        notes.append(f"Above chance: the same after taking off what guessing scores, {chance:.1%}.")
    if counts:
        span = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        notes.append(f"Questions of a task: {span}.")
    return Table(
        header=("budget", *names, "average", "retained", "above chance"),
        rows=rows,
        caption="Accuracy without length normalization" if plain else "Accuracy by budget",
        notes=notes if not plain else (),
        folded=plain,
    )


def _row(
    one: Scores, full: Scores | None, tasks: Sequence[str], chance: float | None
) -> list[Cell]:
    average = one.average(tasks)
    base = None if full is None else full.average(tasks)
    kept = retention(average, base)
    above = None if chance is None else retention(average, base, chance)
    return [
        Cell(percent(one.budget)),
        *(_score(one.tasks.get(task)) for task in tasks),
        _score(average),
        Cell("" if kept is None else f"{kept:.1%}"),
        Cell("" if above is None else f"{above:.1%}"),
    ]


def _score(score: Score | None) -> Cell:
    if score is None:
        return Cell("–")
    small = "" if score.stderr is None else f"±{100 * score.stderr:.1f}"
    return Cell(f"{100 * score.value:.1f}", small)


def _beside_the_paper(found: Sequence[Scores], tasks: Sequence[str]) -> list[Block]:
    """What is retained of the average, beside the paper's two models."""
    full = full_of(found)
    base = None if full is None else full.average(tasks)
    names = list(dict.fromkeys(one.run for one in found if one.budget is not None))
    ours = {
        (one.run, one.budget): kept
        for one in found
        if one.budget is not None and (kept := retention(one.average(tasks), base)) is not None
    }
    if not ours:
        return []
    paper = {
        (model, method): dict(
            zip(PAPER_BUDGETS, (v / PAPER_FULL[model] for v in values), strict=True)
        )
        for (model, method), values in PAPER.items()
    }
    drawn = [
        Line(
            label=name,
            points=[(b, kept) for (run, b), kept in ours.items() if run == name and b is not None],
            style=index,
        )
        for index, name in enumerate(names)
    ]
    drawn += [
        Line(
            label=f"paper: {model} {method}",
            points=list(values.items()),
            style=len(names) + index,
            dash=1,
        )
        for index, ((model, method), values) in enumerate(paper.items())
    ]
    budgets = sorted({*PAPER_BUDGETS, *(b for _, b in ours if b is not None)}, reverse=True)
    panel = Panel(
        x=Axis(label="cache bytes kept", percent=True),
        y=Axis(label="average accuracy, full cache = 100%", percent=True),
        lines=drawn,
    )
    chart = lines(
        "retention",
        [panel],
        text="Share of the full cache's average accuracy against the share of bytes kept.",
        caption="The paper's models are fifty times larger than the default one, and its tasks are "
        "HellaSwag, ARC-c, ARC-e, PIQA, WinoGrande and CSQA: compare shapes, not levels.",
    )
    header = ("budget", *names, *(f"paper: {model}\n{method}" for model, method in PAPER))
    rows = []
    for budget in budgets:
        cells = [ours.get((name, budget)) for name in names]
        cells += [values.get(budget) for values in paper.values()]
        shown = [Cell("–" if value is None else f"{value:.1%}") for value in cells]
        rows.append([Cell(percent(budget)), *shown])
    return [
        chart,
        Table(header=header, rows=rows, caption="Retained average beside the paper's Table 1"),
    ]
