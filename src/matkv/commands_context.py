"""The part of `matkv evaluate` that measures long contexts: bars, tables and what is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matkv import console
from matkv.artifact import Artifact
from matkv.haystack import TESTS, HaystackConfig
from matkv.long_context import (
    NEEDLE,
    NEEDLE_KEYS,
    POSITIONS,
    POSITIONS_KEYS,
    Caches,
    NeedleConfig,
    needles,
    positions,
)
from matkv.store import Store

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run with its model, and the caches to measure; `again` measures what is already known."""

    run: Path
    artifact: Artifact
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    caches: Caches
    again: bool = False


def measure_needles(
    opened: Opened, contexts: Sequence[int], samples: int, seed: int, *, plain: bool
) -> Rows:
    """Retrieval rows of every cache, through the chat template where there is one."""
    chat = not plain and opened.tokenizer.chat_template is not None
    config = NeedleConfig(
        contexts=tuple(dict.fromkeys(contexts)),
        samples=samples,
        haystack=HaystackConfig(chat=chat, seed=seed),
    )
    store = Store(opened.run, NEEDLE, NEEDLE_KEYS, again=opened.again)
    passes = 1 + len(opened.caches.budgets)
    with console.token_progress("searching haystacks", config.tokens * passes) as update:
        return needles(
            opened.model,
            opened.tokenizer,
            opened.artifact,
            opened.caches,
            config,
            store,
            on_progress=update,
        )


def measure_positions(opened: Opened, windows_NT: Tensor, text: str) -> Rows:
    """Perplexity rows of every cache by position in the window."""
    store = Store(opened.run, POSITIONS, POSITIONS_KEYS, again=opened.again)
    passes = 1 + len(opened.caches.budgets)
    with console.token_progress("evaluating", windows_NT.numel() * passes) as update:
        return positions(
            opened.model,
            opened.artifact,
            windows_NT,
            text,
            opened.caches,
            store,
            on_progress=update,
        )


def needle_table(title: str, rows: Rows) -> Table:
    """Accuracy in percent ± one standard error and the answer's loss, over all depths of a context.

    Every depth has as many samples, so that means of rows are means of samples.
    """
    table = Table(title=title, title_justify="left")
    for name in ("context", "budget"):
        table.add_column(name, justify="right")
    for test in TESTS:
        table.add_column(test, justify="right")
        table.add_column("loss", justify="right")
    for context, budget in sorted(
        dict.fromkeys((row["context"], row["budget"]) for row in rows), key=lambda one: one[0]
    ):
        cells: list[str] = []
        for test in TESTS:
            cells += _cells([row for row in rows if _name(row) == (context, budget, test)])
        table.add_row(f"{context:,}", console.budget_name(budget), *cells)
    return table


def _name(row: dict[str, Any]) -> tuple[int, float | None, str]:
    return row["context"], row["budget"], row["test"]


def _cells(rows: Rows) -> tuple[str, str]:
    accuracy = sum(row["accuracy"] for row in rows) / len(rows)
    stderr = math.sqrt(accuracy * (1 - accuracy) / sum(row["n"] for row in rows))
    loss = sum(row["answer_loss"] for row in rows) / len(rows)
    return f"{100 * accuracy:.0f} ± {100 * stderr:.0f}", f"{loss:.2f}"


def positions_table(title: str, rows: Rows) -> Table:
    """Perplexity, a line for each budget and a column for each range of positions."""
    table = Table(title=title, title_justify="left")
    ranges = list(dict.fromkeys((row["start"], row["end"]) for row in rows))
    names = ["budget", *(f"{start:,}-{end - 1:,}" for start, end in ranges), "all"]
    for name in names:
        table.add_column(name, justify="right")
    for budget in dict.fromkeys(row["budget"] for row in rows):
        mine = [row for row in rows if row["budget"] == budget]
        total = sum(row["tokens"] * math.log(row["perplexity"]) for row in mine)
        overall = math.exp(total / sum(row["tokens"] for row in mine))
        values = [*(row["perplexity"] for row in mine), overall]
        table.add_row(console.budget_name(budget), *(f"{value:.2f}" for value in values))
    return table
