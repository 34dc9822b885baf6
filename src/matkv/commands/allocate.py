"""matkv allocate: rank tables for a curve of budgets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerBase

from matkv import data
from matkv.allocate.config import AllocateConfig, Constraints
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.artifact.setting import held_shares
from matkv.artifact.storage import check_target
from matkv.commands import console
from matkv.commands.bars import progress_bar
from matkv.commands.from_fields import from_fields
from matkv.commands.options import JsonOpt, Loading, OutOpt, RunArg, TextOpt
from matkv.commands.tables import heatmap, tables_table
from matkv.data.task_texts import text_batches, training_texts
from matkv.report.pictures.maps import rank_maps
from matkv.report.pictures.theme import save

# Sequences searched together have at most this many tokens: their logits are in memory at once.
BATCH_TOKENS = 2048


@from_fields(without=("constraints",), budgets="budget", protected="protect")
def allocate_command(
    run: RunArg,
    constraints: Constraints,
    config: AllocateConfig,
    loading: Loading,
    out: OutOpt = None,
    text: TextOpt = "default",
    tasks: Annotated[
        str | None, typer.Option(help="search on training items of these tasks, comma-separated")
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="directory of TASK.jsonl; lm-eval's own unless given")
    ] = None,
    length: Annotated[int, typer.Option(help="tokens of one sequence", min=2)] = 1024,
    picture: Annotated[Path | None, typer.Option(help="heat map of the first budget, PNG")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Find the rank of every layer, head and side, for a curve of budgets at once."""
    target = out or run
    place = target.resolve()
    check_target(target)
    config = replace(config, constraints=constraints)
    artifact, model, tokenizer = loading.open(run)
    solved = training_texts(tasks.split(","), tasks_dir) if tasks is not None else None
    batches = _search_batches(tokenizer, data.read_texts(text, "train"), solved, length, config)
    state = place.with_name(f".{place.name}.allocate.jsonl")
    with progress_bar("searching") as update:
        found = allocate(model, artifact, batches, config, state=state, on_progress=update)
    found.save(target)
    entry = found.history[-1]
    if entry["interrupted"]:
        console.err.print(f"interrupted: {target} has the tables reached; run again to go on")
        sys.exit(130)
    state.unlink(missing_ok=True)
    _show_tables(found, config.budgets, picture, entry, as_json)


def _search_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    solved: list[str] | None,
    length: int,
    config: AllocateConfig,
) -> Iterator[Any]:
    """Held-out text, then text to search on: `solved` tasks where they are given.

    Both are drawn from all of the text: what stands first in it may be all of one kind.
    """
    windows = data.text_windows(tokenizer, texts, length)
    at_once = max(1, min(BATCH_TOKENS, config.search_tokens) // length)
    order = torch.Generator().manual_seed(config.seed)
    batches = data.batches(windows, at_once, generator=order)
    if solved is None:
        yield from batches
        return
    yield from islice(batches, -(-config.held_out_tokens // (at_once * length)))
    yield from text_batches(tokenizer, solved, 8)


def _show_tables(
    found: Artifact,
    budgets: tuple[float, ...] | None,
    picture: Path | None,
    entry: dict[str, Any],
    as_json: bool,
) -> None:
    first = budgets[0] if budgets else min(found.tables, key=lambda one: abs(one - 0.375))
    if picture is not None:
        save(rank_maps("ranks", {first: found.tables[first]}), picture)
    if as_json:
        parts = {"tables": entry["tables"], "held": held_shares(found)}
        console.print_json(parts | {"seconds": entry["seconds"]})
        return
    console.out.print(heatmap(found.tables[first]))
    console.out.print(tables_table(found, entry["tables"]))
