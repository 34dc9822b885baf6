"""matkv evaluate: quality at every budget, by perplexity, tasks and long contexts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv import data
from matkv.artifact.artifact import Artifact
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import Setting
from matkv.commands import console
from matkv.commands.bars import task_progress, token_progress
from matkv.commands.options import (
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    RecentOpt,
    RunArg,
    SinkOpt,
    TrustOpt,
    UniformOpt,
    open_run,
)
from matkv.commands.tables import evaluation_table, needle_table, positions_table, tasks_table
from matkv.data.haystacks import HaystackConfig
from matkv.data.task_items import LoadedTask, load_tasks
from matkv.errors import MatkvError
from matkv.evaluate.needles import NEEDLE, NeedleConfig, needles
from matkv.evaluate.positions import POSITIONS, positions
from matkv.evaluate.scores import summarize
from matkv.evaluate.tasks import TASKS, TaskConfig, score_tasks
from matkv.evaluate.texts import PERPLEXITY, perplexity_rows

# Where neither the command nor the artifact says which.
BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25)
Rows = list[dict[str, Any]]


def evaluate_command(
    run: RunArg,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="repeatable; those of the artifact's rank tables unless given"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="default, a .txt or .jsonl file, a directory of .txt, or hub:NAME[:CONFIG]; "
            "default unless tasks or long contexts are given"
        ),
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
    limit: Annotated[
        int | None, typer.Option(help="items of each task, drawn at random; all unless given")
    ] = None,
    long_context: Annotated[
        list[int] | None,
        typer.Option(help="tokens of haystacks to find facts in, repeatable"),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="haystacks of each test, context and depth", min=1)
    ] = 10,
    plain: Annotated[
        bool, typer.Option("--plain", help="haystacks without the tokenizer's chat template")
    ] = False,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="perplexity by position in the window")
    ] = False,
    seed: Annotated[int, typer.Option(help="seed of the draw and of haystacks")] = 0,
    batch_size: Annotated[int, typer.Option(help="sequences scored at once, of tasks")] = 16,
    again: Annotated[bool, typer.Option("--again", help="measure what is already known")] = False,
    uniform: UniformOpt = False,
    sink: SinkOpt = None,
    recent: RecentOpt = None,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Perplexity, accuracy on tasks and retrieval, of the full cache and of each budget.

    Results are kept in RUN/results; what is already there is not measured again.
    """
    way = Setting(uniform=uniform, sink=sink, recent=recent)
    for one in budget or ():
        way.at(one)
    task_config = TaskConfig(limit=limit, seed=seed, batch_size=batch_size)
    loaded = _load_tasks(tasks, tasks_dir, limit)
    alone = not loaded and not long_context
    source = text or ("default" if alone or by_position else None)
    texts = None if source is None else data.read_texts(source, "validation")
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
    chosen = tuple(budget or sorted(artifact.tables, reverse=True) or BUDGETS)
    opened = Opened(
        run=run,
        artifact=artifact,
        model=model,
        tokenizer=tokenizer,
        settings=[way.at(one) for one in (None, *chosen)],
        again=again,
    )
    rows: Rows = []
    if source is not None and texts is not None:
        windows = data.text_windows(tokenizer, texts, length, tokens)
        if by_position:
            rows += measure_positions(opened, windows, _name(source))
        else:
            rows += measure_texts(opened, windows, _name(source))
        if not as_json and by_position:
            title = f"{run} on {source}, perplexity by position"
            console.out.print(positions_table(title, rows))
        elif not as_json:
            _show_texts(artifact, f"{run} on {source}, windows of {length}", rows)
    if loaded:
        scored = measure_tasks(opened, loaded, task_config)
        rows += scored
        if not as_json:
            count = "all items" if limit is None else f"up to {limit} items each"
            console.out.print(tasks_table(f"{run}, accuracy in %, {count}", scored))
    if long_context:
        found = measure_needles(opened, long_context, samples, seed, plain=plain)
        rows += found
        if not as_json:
            title = f"{run}, facts found in haystacks in %, {samples} a depth"
            console.out.print(needle_table(title, found))
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


def _show_texts(artifact: Artifact, title: str, rows: Rows) -> None:
    console.out.print(evaluation_table(title, rows))
    fixed = sum(not shape.grows for shape in artifact.geometry.layers)
    if fixed:
        console.out.print(f"{fixed} layers have sliding windows: uncompressed, not in bytes/token")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run with its model, and the settings to measure; `again` measures what is already known."""

    run: Path
    artifact: Artifact
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Sequence[Setting]
    again: bool = False

    def results(self, kind: Kind) -> Results:
        return Results(self.run, kind, again=self.again)


def measure_texts(opened: Opened, windows_NT: Tensor, text: str) -> Rows:
    """Perplexity rows of every setting."""
    results = opened.results(PERPLEXITY)
    with token_progress("evaluating", windows_NT.numel() * len(opened.settings)) as update:
        return perplexity_rows(
            opened.model,
            opened.artifact,
            windows_NT,
            text,
            opened.settings,
            results,
            on_progress=update,
        )


def measure_positions(opened: Opened, windows_NT: Tensor, text: str) -> Rows:
    """Perplexity rows of every setting by position in the window."""
    results = opened.results(POSITIONS)
    with token_progress("evaluating", windows_NT.numel() * len(opened.settings)) as update:
        return positions(
            opened.model,
            opened.artifact,
            windows_NT,
            text,
            opened.settings,
            results,
            on_progress=update,
        )


def measure_tasks(opened: Opened, tasks: Sequence[LoadedTask], config: TaskConfig) -> Rows:
    """Accuracies of every setting, and their averages."""
    results = opened.results(TASKS)
    with task_progress() as update:
        rows = score_tasks(
            opened.model,
            opened.tokenizer,
            opened.artifact,
            tasks,
            opened.settings,
            config,
            results,
            on_progress=lambda at: update(at.task, at.budget, at.done, at.total),
        )
    return summarize(rows)


def measure_needles(
    opened: Opened, contexts: Sequence[int], samples: int, seed: int, *, plain: bool
) -> Rows:
    """Retrieval rows of every setting, through the chat template where there is one."""
    chat = not plain and opened.tokenizer.chat_template is not None
    config = NeedleConfig(
        contexts=tuple(dict.fromkeys(contexts)),
        samples=samples,
        haystack=HaystackConfig(chat=chat, seed=seed),
    )
    results = opened.results(NEEDLE)
    with token_progress("searching haystacks", config.tokens * len(opened.settings)) as update:
        return needles(
            opened.model,
            opened.tokenizer,
            opened.artifact,
            opened.settings,
            config,
            results,
            on_progress=update,
        )
