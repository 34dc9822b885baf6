"""matkv allocate: rank tables for a curve of budgets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedTokenizerBase

from matkv import data
from matkv.allocate.config import AllocateConfig, Constraints
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.artifact.storage import check_target
from matkv.commands import console
from matkv.commands.bars import search_progress
from matkv.commands.options import (
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    OutOpt,
    RunArg,
    TextOpt,
    TrustOpt,
    open_run,
)
from matkv.commands.tables import heatmap, tables_table
from matkv.data.task_texts import text_batches, training_texts
from matkv.errors import BudgetError
from matkv.report.pictures.maps import rank_maps
from matkv.report.pictures.theme import save

# Sequences searched together have at most this many tokens: their logits are in memory at once.
BATCH_TOKENS = 2048


def allocate_command(
    run: RunArg,
    out: OutOpt = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="may be given several times; every eighth by default")
    ] = None,
    method: Annotated[str, typer.Option(help="fisher, greedy or uniform")] = "fisher",
    text: TextOpt = "default",
    tasks: Annotated[
        str | None, typer.Option(help="search on training items of these tasks, comma-separated")
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="directory of TASK.jsonl; lm-eval's own unless given")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="grain of ranks, an eighth of the head dim")
    ] = None,
    multiple: Annotated[int, typer.Option(help="ranks are multiples of this", min=1)] = 1,
    min_rank: Annotated[
        int | None, typer.Option(help="smallest rank; the smallest trained unless given", min=0)
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="largest rank")] = None,
    equal_sides: Annotated[
        bool, typer.Option("--equal-sides", help="key rank = value rank")
    ] = False,
    equal_heads: Annotated[
        bool, typer.Option("--equal-heads", help="one rank for a layer's heads of a side")
    ] = False,
    protect: Annotated[list[int] | None, typer.Option(help="layer to keep at full rank")] = None,
    max_kl: Annotated[float | None, typer.Option(help="smallest cache within this KL")] = None,
    max_perplexity_increase: Annotated[
        str | None, typer.Option(help="smallest cache within this increase, as 5% or 0.05")
    ] = None,
    expansions: Annotated[int, typer.Option(help="fisher: points on the way down", min=1)] = 36,
    search_tokens: Annotated[int, typer.Option(help="tokens read at a time", min=1)] = 2048,
    length: Annotated[int, typer.Option(help="tokens of one sequence", min=2)] = 1024,
    drops: Annotated[int, typer.Option(help="greedy: drops a round", min=1)] = 1,
    picture: Annotated[Path | None, typer.Option(help="heat map of the first budget, PNG")] = None,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Find the rank of every layer, head and side, for a whole curve of budgets at once."""
    target = out or run
    check_target(target)
    config = AllocateConfig(
        method=method,  # type: ignore[arg-type]
        budgets=tuple(budget) if budget else None,
        constraints=Constraints(
            step=step,
            multiple=multiple,
            min_rank=min_rank,
            max_rank=max_rank,
            equal_sides=equal_sides,
            equal_heads=equal_heads,
            protected=tuple(protect or ()),
        ),
        max_kl=max_kl,
        max_perplexity_increase=_fraction(max_perplexity_increase),
        search_tokens=search_tokens,
        expansions=expansions,
        drops=drops,
    )
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
    solved = training_texts(tasks.split(","), tasks_dir) if tasks is not None else None
    batches = _search_batches(tokenizer, data.read_texts(text, "train"), solved, length, config)
    state = target.with_name(f".{target.name}.allocate.jsonl")
    with search_progress() as update:
        found = allocate(model, artifact, batches, config, state=state, on_progress=update)
    found.save(target)
    entry = found.history[-1]
    if entry["interrupted"]:
        console.err.print(f"interrupted: {target} has the tables reached; run again to go on")
        sys.exit(130)
    state.unlink(missing_ok=True)
    _show_tables(found, budget, picture, entry, as_json)


def _search_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    solved: list[str] | None,
    length: int,
    config: AllocateConfig,
) -> Iterator[Any]:
    """Held-out text, then text to search on: `solved` tasks where they are given."""
    limit = config.held_out_tokens
    if solved is None:
        limit += config.expansions * config.search_tokens
    windows = data.text_windows(tokenizer, texts, length, limit)
    at_once = max(1, min(BATCH_TOKENS, config.search_tokens) // length)
    yield from data.batches(windows, at_once)
    if solved is not None:
        yield from text_batches(tokenizer, solved, 8)


def _show_tables(
    found: Artifact,
    budget: list[float] | None,
    picture: Path | None,
    entry: dict[str, Any],
    as_json: bool,
) -> None:
    first = budget[0] if budget else min(found.tables, key=lambda one: abs(one - 0.375))
    if picture is not None:
        save(rank_maps("ranks", {first: found.tables[first]}), picture)
    if as_json:
        console.print_json({"tables": entry["tables"], "seconds": entry["seconds"]})
        return
    console.out.print(heatmap(found.tables[first]))
    console.out.print(tables_table(entry["tables"]))


def _fraction(text: str | None) -> float | None:
    """0.05 from "5%" or "0.05"."""
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise BudgetError(f"{text!r} must be a percentage, as 5%, or a fraction, as 0.05") from None
