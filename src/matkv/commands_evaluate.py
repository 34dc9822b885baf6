"""The command that evaluates an artifact: perplexity of a text, tasks, long contexts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv import console, data
from matkv.artifact import Artifact
from matkv.commands_context import (
    Opened,
    measure_needles,
    measure_positions,
    needle_table,
    positions_table,
)
from matkv.errors import MatkvError
from matkv.evaluate import TextConfig, perplexity_rows
from matkv.long_context import Caches
from matkv.options import (
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
from matkv.ranks import check_budget
from matkv.task_files import LoadedTask, load_tasks
from matkv.task_scores import summarize
from matkv.tasks import TaskConfig, score_tasks

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
    window: Annotated[int, typer.Option(help="tokens of one sequence of text", min=2)] = 1024,
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
    for one in budget or ():
        check_budget(one)
    task_config = TaskConfig(
        limit=limit,
        seed=seed,
        uniform=uniform,
        sink=sink,
        window=recent,
        batch_size=batch_size,
        again=again,
    )
    loaded = _load_tasks(tasks, tasks_dir, limit)
    alone = not loaded and not long_context
    source = text or ("default" if alone or by_position else None)
    texts = None if source is None else data.read_texts(source, "validation")
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
    chosen = tuple(budget or sorted(artifact.tables, reverse=True) or BUDGETS)
    budgets = [None, *chosen]
    caches = Caches(budgets=chosen, uniform=uniform, sink=sink, window=recent)
    opened = Opened(
        run=run, artifact=artifact, model=model, tokenizer=tokenizer, caches=caches, again=again
    )
    rows: Rows = []
    if source is not None and texts is not None and by_position:
        windows = data.text_windows(tokenizer, texts, window, tokens)
        placed = measure_positions(opened, windows, _name(source))
        rows += placed
        if not as_json:
            title = f"{run} on {source}, perplexity by position"
            console.out.print(positions_table(title, placed))
    elif source is not None and texts is not None:
        windows = data.text_windows(tokenizer, texts, window, tokens)
        text_config = TextConfig(
            text=_name(source), uniform=uniform, sink=sink, window=recent, again=again
        )
        with console.token_progress("evaluating", windows.numel() * len(budgets)) as update:
            rows += perplexity_rows(
                model,
                artifact,
                windows,
                budgets,
                text_config,
                run=run,
                on_progress=lambda at, done: update(budgets.index(at) * windows.numel() + done),
            )
        if not as_json:
            _show_texts(artifact, f"{run} on {source}, windows of {window}", rows)
    if loaded:
        scored = _score(run, artifact, model, tokenizer, loaded, budgets, task_config)
        rows += scored
        if not as_json:
            count = "all items" if limit is None else f"up to {limit} items each"
            console.out.print(console.tasks_table(f"{run}, accuracy in %, {count}", scored))
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


def _score(
    run: Path,
    artifact: Artifact,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[LoadedTask],
    budgets: Sequence[float | None],
    config: TaskConfig,
) -> Rows:
    with console.task_progress() as update:
        rows = score_tasks(
            model,
            tokenizer,
            artifact,
            tasks,
            budgets,
            config,
            run=run,
            on_progress=lambda at: update(at.task, at.budget, at.done, at.total),
        )
    return summarize(rows)


def _show_texts(artifact: Artifact, title: str, rows: Rows) -> None:
    console.out.print(console.evaluation_table(title, rows))
    fixed = sum(not shape.grows for shape in artifact.geometry.layers)
    if fixed:
        console.out.print(f"{fixed} layers have sliding windows: uncompressed, not in bytes/token")
