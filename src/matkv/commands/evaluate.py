"""matkv evaluate: quality at every budget, by perplexity, tasks and long contexts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv import data
from matkv.artifact.artifact import Artifact
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import Setting, staying_text
from matkv.commands import console
from matkv.commands.bars import progress_bar
from matkv.commands.from_fields import from_fields
from matkv.commands.options import TEXT_HELP, JsonOpt, Loading, RunArg
from matkv.commands.tables import (
    divergence_table,
    evaluation_table,
    needle_table,
    positions_table,
    tasks_table,
)
from matkv.data.haystacks import HaystackConfig
from matkv.data.task_items import LoadedTask, load_tasks
from matkv.errors import MatkvError
from matkv.evaluate.divergences import DIVERGENCE, divergences
from matkv.evaluate.needles import NEEDLE, NeedleConfig, needles
from matkv.evaluate.positions import POSITIONS, positions
from matkv.evaluate.scores import summarize
from matkv.evaluate.tasks import TASKS, TaskConfig, score_tasks
from matkv.evaluate.texts import PERPLEXITY, perplexity_rows

# Where neither the command nor the artifact says which.
BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25)
Rows = list[dict[str, Any]]


@from_fields(without=("budget",), contexts="long_context")
def evaluate_command(
    run: RunArg,
    task_config: TaskConfig,
    needle_config: NeedleConfig,
    way: Setting,
    loading: Loading,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="repeatable; those of the artifact's rank tables unless given"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help=f"{TEXT_HELP}; default unless tasks or long contexts are given"),
    ] = None,
    length: Annotated[int, typer.Option(help="tokens of one sequence of text", min=2)] = 1024,
    tokens: Annotated[
        int | None, typer.Option(help="tokens of text to score; all unless given")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="tasks, separated by commas: piqa,arc_easy")
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="folder of TASK.jsonl; lm-eval's own tasks unless given")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="haystacks without the tokenizer's chat template")
    ] = False,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="perplexity by position in the window")
    ] = False,
    divergence: Annotated[
        bool, typer.Option("--divergence", help="KL from the full cache, and equal next tokens")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="measure what is already known")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Perplexity, accuracy on tasks and retrieval, of the full cache and each budget.

    Results are kept in RUN/results; what is already there is not measured again.
    """
    for one in budget or ():
        way.at(one)
    loaded = _load_tasks(tasks, tasks_dir, task_config.limit)
    alone = not loaded and not needle_config.contexts
    source = text or ("default" if alone or by_position or divergence else None)
    texts = None if source is None else data.read_texts(source, "validation")
    opened = Opened(run, *loading.open(run), way, budget, again=again, shown=not as_json)
    rows: Rows = []
    if source is not None and texts is not None:
        windows = data.text_windows(opened.tokenizer, texts, length, tokens)
        measures = [measure_divergences] * divergence + [measure_positions] * by_position
        for measure in measures or [measure_texts]:
            rows += measure(opened, windows, source)
    if loaded:
        rows += measure_tasks(opened, loaded, task_config)
    if needle_config.contexts:
        rows += measure_needles(opened, needle_config, task_config.seed, plain=plain)
    if as_json:
        console.print_json({"rows": rows})


def _name(source: str) -> str:
    """What results call a text: a file is the same wherever it lies."""
    return Path(source).name if Path(source).exists() else source


def _load_tasks(names: str | None, folder: Path | None, limit: int | None) -> list[LoadedTask]:
    if names is None:
        for option, value in (("--tasks-dir", folder), ("--limit", limit)):
            if value is not None:
                raise MatkvError(f"{option} {value} needs --tasks, as --tasks piqa,arc_easy")
        return []
    # It warns of everything that is not its own way of loading models and data.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return load_tasks(names.split(","), folder)


@dataclass(frozen=True)
class Opened:
    """A run with its model, and what to measure of it.

    `budgets` are those of the artifact's tables unless given; `again` measures what is already
    known; `shown` prints tables.
    """

    run: Path
    artifact: Artifact
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    way: Setting
    budgets: Sequence[float] | None
    again: bool
    shown: bool

    @property
    def settings(self) -> list[Setting]:
        """The full cache and every budget."""
        chosen = self.budgets or sorted(self.artifact.tables, reverse=True) or BUDGETS
        return [self.way.at(budget) for budget in (None, *chosen)]

    @property
    def parts(self) -> tuple[PreTrainedModel, Artifact]:
        return self.model, self.artifact

    def results(self, kind: Kind) -> Results:
        return Results(self.run, kind, again=self.again)

    def show(self, table: Table) -> None:
        table.caption = staying_text(self.artifact, self.settings)
        if self.shown:
            console.out.print(table)


def measure_texts(opened: Opened, windows_NT: Tensor, source: str) -> Rows:
    """Perplexity rows of every setting."""
    settings, results = opened.settings, opened.results(PERPLEXITY)
    with progress_bar("evaluating") as update:
        rows = perplexity_rows(
            *opened.parts, windows_NT, _name(source), settings, results, on_progress=update
        )
    title = f"{opened.run} on {source}, windows of {windows_NT.shape[1]}"
    opened.show(evaluation_table(title, rows))
    return rows


def measure_positions(opened: Opened, windows_NT: Tensor, source: str) -> Rows:
    """Perplexity rows of every setting by position in the window."""
    settings, results = opened.settings, opened.results(POSITIONS)
    with progress_bar("evaluating") as update:
        rows = positions(
            *opened.parts, windows_NT, _name(source), settings, results, on_progress=update
        )
    opened.show(positions_table(f"{opened.run} on {source}, perplexity by position", rows))
    return rows


def measure_divergences(opened: Opened, windows_NT: Tensor, source: str) -> Rows:
    """How far every budget's predictions are from the full cache's."""
    settings, results = opened.settings, opened.results(DIVERGENCE)
    with progress_bar("evaluating") as update:
        rows = divergences(
            *opened.parts, windows_NT, _name(source), settings, results, on_progress=update
        )
    title = f"{opened.run} on {source}, {len(windows_NT)} windows of {windows_NT.shape[1]}"
    opened.show(divergence_table(title, rows))
    return rows


def measure_tasks(opened: Opened, tasks: Sequence[LoadedTask], config: TaskConfig) -> Rows:
    """Accuracies of every setting, and their averages."""
    with progress_bar("tasks") as update:
        scored = score_tasks(
            opened.model,
            opened.tokenizer,
            opened.artifact,
            tasks,
            opened.settings,
            config,
            opened.results(TASKS),
            on_progress=update,
        )
    rows = summarize(scored)
    count = "all items" if config.limit is None else f"up to {config.limit} items each"
    opened.show(tasks_table(f"{opened.run}, accuracy in %, {count}", rows))
    return rows


def measure_needles(opened: Opened, config: NeedleConfig, seed: int, *, plain: bool) -> Rows:
    """Retrieval rows of every setting, through the chat template where there is one."""
    chat = not plain and opened.tokenizer.chat_template is not None
    config = replace(
        config,
        contexts=tuple(dict.fromkeys(config.contexts)),
        haystack=HaystackConfig(chat=chat, seed=seed),
    )
    settings = opened.settings
    with progress_bar("searching haystacks") as update:
        rows = needles(
            opened.model,
            opened.tokenizer,
            opened.artifact,
            settings,
            config,
            opened.results(NEEDLE),
            on_progress=update,
        )
    title = f"{opened.run}, facts found in haystacks in %, {config.samples} a depth"
    opened.show(needle_table(title, rows))
    return rows
