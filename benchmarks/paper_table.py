"""The paper's Table 1: accuracy and perplexity of several artifacts at seven budgets, as Markdown.

    for RUN in pca calibrated distilled; do
        matkv evaluate $RUN --budget 1 --budget 0.875 ... --budget 0.25 --uniform \
            --tasks arc_challenge,arc_easy,piqa,winogrande,commonsense_qa --limit N --tasks-dir DIR
        matkv evaluate $RUN --budget ... --uniform --text wikitext2-test.txt --window 1024
    done
    python benchmarks/paper_table.py pca calibrated distilled --uniform

Reads what these commands kept in RUN/results and measures nothing. Rows of other bases than the
artifact's are left out, and of several measurements those of most tokens, or most items, stay,
and only budgets with all tasks. The difference to the full cache is taken item by item.
"""

import argparse
import math
from pathlib import Path

from matkv import results
from matkv.artifact import Artifact
from matkv.results import Record
from matkv.task_scores import AVERAGE, summarize


def rows_of(run: Path, kind: str, uniform: bool) -> list[Record]:
    """The rows of this artifact's own bases, ranks and window, and of the full cache."""
    artifact = Artifact.load(run)
    mine, windows = results.digest(artifact), (None, artifact.window)

    def fits(row: Record) -> bool:
        if row["artifact"] != mine or row["window"] not in windows:
            return False
        if row["budget"] is None:
            return True
        table = artifact.table(row["budget"], uniform=uniform)
        return bool(row["ranks"] == results.digest_of(table))

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


def table(run: Path, uniform: bool) -> str:
    """The Markdown table of one artifact."""
    scored = rows_of(run, "perplexity", uniform)
    most = max((row["tokens"] for row in scored), default=0)
    scores = {row["budget"]: row for row in scored if row["tokens"] == most}
    items = rows_of(run, "tasks", uniform)
    limit = max((row["limit"] or math.inf for row in items), default=0)
    items = complete([row for row in items if (row["limit"] or math.inf) == limit])
    by_budget: dict[float | None, dict[str, Record]] = {}
    for row in summarize(items):
        by_budget.setdefault(row["budget"], {})[row["task"]] = row
    budgets = sorted({b for b in [*scores, *by_budget] if b is not None}, reverse=True)
    names = [task for task in next(iter(by_budget.values()), {}) if task != AVERAGE]
    head = [run.name, "perplexity", *names]
    head += ["average", "against full", "kept"] if names else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for budget in [None, *budgets]:
        name = "full cache" if budget is None else f"{budget:.1%}"
        cells = line(name, by_budget.get(budget, {}), scores.get(budget))
        lines.append("| " + " | ".join(cells + [""] * (len(head) - len(cells))) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--uniform", action="store_true", help="rows of uniform ranks")
    options = parser.parse_args()
    for run in options.runs:
        print(table(run, options.uniform), end="\n\n")


if __name__ == "__main__":
    main()
