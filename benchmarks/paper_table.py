"""The paper's Table 1: accuracy and perplexity of several artifacts at seven budgets, as Markdown.

    for RUN in pca calibrated distilled; do
        matkv evaluate $RUN --budget 1 --budget 0.875 ... --budget 0.25 --uniform \
            --tasks arc_challenge,arc_easy,piqa,winogrande,commonsense_qa --limit N --tasks-dir DIR
        matkv evaluate $RUN --budget ... --uniform --text wikitext2-test.txt --length 1024
    done
    python benchmarks/paper_table.py pca calibrated distilled --uniform

Reads what these commands kept in RUN/results and measures nothing. Rows of other bases than the
artifact's are left out, and of several measurements those of most tokens, or most items, stay,
and only budgets with all tasks. The difference to the full cache is taken item by item.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

from matkv.artifact import results
from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.evaluate.scores import AVERAGE, summarize


def rows_of(run: Path, kind: str, uniform: bool) -> list[Record]:
    """The rows of this artifact's own bases, ranks and recent, and of the full cache."""
    artifact = Artifact.load(run)
    mine, windows = artifact.digest, (None, artifact.recent)

    def fits(row: Record) -> bool:
        if row["artifact"] != mine or row["recent"] not in windows:
            return False
        if row["budget"] is None:
            return True
        table = artifact.table(row["budget"], uniform=uniform)
        return bool(row["ranks"] == table.digest)

    return [row for row in results.load_rows(run, kind) if fits(row)]


def complete(rows: list[Record]) -> list[Record]:
    """Without the budgets that lack a task: their averages would be of other tasks."""
    tasks = {row["task"] for row in rows}
    found: dict[float | None, set[str]] = {}
    for row in rows:
        found.setdefault(row["budget"], set()).add(row["task"])
    return [row for row in rows if found[row["budget"]] == tasks]


def line(name: str, tasks: dict[str, Record], score: Record | None) -> list[str]:
    """One budget: perplexity, accuracy on every task, their average and what it keeps."""
    cells = [name, "" if score is None else f"{score['perplexity']:.1f}"]
    cells += [
        f"{100 * row['acc']:.1f} ± {100 * row['stderr']:.1f}"
        for task, row in tasks.items()
        if task != AVERAGE
    ]
    if (mean := tasks.get(AVERAGE)) is None:
        return cells
    cells.append(f"**{100 * mean['acc']:.1f}** ± {100 * mean['stderr']:.1f}")
    if mean["difference"] is not None:
        change = f"{100 * mean['difference']:+.1f} ± {100 * mean['difference_stderr']:.1f}"
        cells += [change, f"{mean['retention']:.1%}"]
    return cells


def perplexities(run: Path, uniform: bool) -> dict[float | None, Record]:
    """The row of every budget, of the most tokens that any was measured on."""
    rows = rows_of(run, "perplexity", uniform)
    most = max((row["tokens"] for row in rows), default=0)
    return {row["budget"]: row for row in rows if row["tokens"] == most}


def accuracies(run: Path, uniform: bool) -> dict[float | None, dict[str, Record]]:
    """Every budget's tasks and their average, of the most items that any was measured on."""
    rows = rows_of(run, "tasks", uniform)
    limit = max((row["limit"] or math.inf for row in rows), default=0)
    by_budget: dict[float | None, dict[str, Record]] = {}
    for row in summarize(complete([row for row in rows if (row["limit"] or math.inf) == limit])):
        by_budget.setdefault(row["budget"], {})[row["task"]] = row
    return by_budget


def name_of(budget: float | None) -> str:
    return "full cache" if budget is None else f"{budget:.1%}"


def table(run: Path, uniform: bool) -> str:
    """The Markdown table of one artifact: a row for every budget."""
    scores, tasks = perplexities(run, uniform), accuracies(run, uniform)
    names = [task for task in next(iter(tasks.values()), {}) if task != AVERAGE]
    head = [run.name, "perplexity", *names]
    head += ["average", "against full", "kept"] if names else []
    lines = [head, ["---"] * len(head)]
    for budget in [None, *falling(scores, tasks)]:
        cells = line(name_of(budget), tasks.get(budget, {}), scores.get(budget))
        lines.append(cells + [""] * (len(head) - len(cells)))
    return markdown(lines)


def summary(runs: list[Path], uniform: bool) -> str:
    """The Markdown table of all artifacts: average accuracy and what it keeps, for every budget."""
    found = {run.name: accuracies(run, uniform) for run in runs}
    budgets = [None, *falling(*found.values())]
    lines = [["", *map(name_of, budgets)], ["---"] * (len(budgets) + 1)]
    for name, tasks in found.items():
        means = [tasks.get(budget, {}).get(AVERAGE) for budget in budgets]
        lines.append([name, *("" if mean is None else kept(mean) for mean in means)])
    return markdown(lines)


def kept(mean: Record) -> str:
    accuracy = f"{100 * mean['acc']:.1f}"
    return accuracy if mean["retention"] is None else f"{accuracy} ({mean['retention']:.1%})"


def falling(*by_budget: Mapping[float | None, object]) -> list[float]:
    """All budgets but the full cache's, the largest first."""
    return sorted({b for rows in by_budget for b in rows if b is not None}, reverse=True)


def markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--uniform", action="store_true", help="rows of uniform ranks")
    parser.add_argument("--summary", action="store_true", help="one table of average accuracies")
    options = parser.parse_args()
    if options.summary:
        print(summary(options.runs, options.uniform))
        return
    for run in options.runs:
        print(table(run, options.uniform), end="\n\n")


if __name__ == "__main__":
    main()
