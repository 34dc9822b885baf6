"""How a cache is set when something is measured with it, and how results say so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from pydantic import Field

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.errors import MatkvError, RankError
from matkv.ranks import Budget, RankTable
from matkv.settings import Number, settings

# What a row was measured with: another row with equal values of these is the same measurement.
# `uniform` says no more than `ranks`, which outlasts a search for other tables.
CACHE_KEYS = ("artifact", "ranks", "budget", "sink", "recent", "dtype")
# How every kind of row spells the full cache.
FULL: Record = dict.fromkeys(("ranks", "budget", "uniform", "sink", "recent"))
LENGTHS = (1024, 32768)  # tokens after which it is said what of the whole cache is held


def budget_name(budget: float | None) -> str:
    """A budget as tables and notes show it."""
    return "full cache" if budget is None else f"{budget:.1%}"


@settings(RankError)
class Setting:
    """A cache at a budget, None for the full one.

    `uniform` ignores stored rank tables; `sink` and `recent`, the numbers of first and last tokens
    kept exact, are the artifact's where they are None. Without a budget it is a way to use caches,
    to be set `at` one.

    Raises:
        BudgetError, RankError: a value is outside its range.
    """

    budget: Budget | None = Field(default=None, description="fraction of cache bytes to keep")
    uniform: bool = Field(default=False, description="ignore stored rank tables")
    sink: Number | None = Field(default=None, description="first tokens to keep exact")
    recent: Number | None = Field(default=None, description="last tokens to keep exact")

    def __str__(self) -> str:
        """What is special of it beside the budget; nothing of the plain one."""
        parts = ["uniform ranks" if self.uniform else ""]
        parts.append(f"first {self.sink} exact" if self.sink else "")
        parts.append(f"last {self.recent} exact" if self.recent else "")
        return ", ".join(part for part in parts if part)

    def at(self, budget: float | None) -> Setting:
        """The same at another budget."""
        return replace(self, budget=budget)

    def table(self, artifact: Artifact) -> RankTable | None:
        """The ranks of an artifact so used; None for the full cache."""
        return None if self.budget is None else artifact.table(self.budget, uniform=self.uniform)

    def exact(self, artifact: Artifact) -> tuple[int, int]:
        """The numbers of first and of last tokens kept exact."""
        sink = artifact.sink if self.sink is None else self.sink
        return sink, artifact.recent if self.recent is None else self.recent

    def record(self, artifact: Artifact, dtype: torch.dtype) -> Record:
        """What identifies the cache in results, the same fields in all of them."""
        about = {"artifact": artifact.digest, "dtype": str(dtype).removeprefix("torch.")}
        table = self.table(artifact)
        if table is None:
            return FULL | about
        sink, recent = self.exact(artifact)
        how = {"budget": self.budget, "uniform": self.uniform, "sink": sink, "recent": recent}
        return FULL | about | how | {"ranks": table.digest}


def held_shares(artifact: Artifact) -> dict[str, dict[str, float]]:
    """What of the whole cache the tables of a run hold at `LENGTHS`, by budget and tokens."""
    exact = {"sink": artifact.sink, "recent": artifact.recent}
    return {
        str(budget): {str(tokens): table.held(tokens, **exact) for tokens in LENGTHS}
        for budget, table in sorted(artifact.tables.items())
    }


def staying_text(artifact: Artifact, settings: Iterable[Setting] = ()) -> str | None:
    """Of which layers budgets are, and what settings hold of all; None where they are of all."""
    geometry = artifact.geometry
    if not geometry.staying:
        return None
    text = (
        f"{geometry.staying} of {len(geometry.layers)} layers have a sliding window and stay as "
        "they are: budgets and bytes a token are of the others"
    )
    parts = []
    for setting in settings:
        table, (sink, recent) = setting.table(artifact), setting.exact(artifact)
        if table is not None:
            held = (f"{table.held(tokens, sink=sink, recent=recent):.1%}" for tokens in LENGTHS)
            parts.append(f"{budget_name(setting.budget)} is {' and '.join(held)}")
    lengths = " and ".join(f"{tokens:,}" for tokens in LENGTHS)
    return f"{text}. Of all bytes at {lengths} tokens {'; '.join(parts)}" if parts else text


def was_uniform(row: Record, artifact: Artifact) -> bool | None:
    """Whether a row was measured with uniform ranks; None if with neither these nor stored ones.

    Ranks that a search has replaced may be uniform ones, whatever the row says. Without tables
    uniform ranks are all there is, and need no mention.
    """
    budget, ranks = row.get("budget"), row.get("ranks")
    if budget is None or ranks is None:
        return bool(row.get("uniform"))
    if ranks in {table.digest for table in artifact.tables.values()}:
        return False
    try:
        uniform = RankTable.uniform(artifact.geometry, budget)
    except MatkvError:  # another step than the default made such a budget possible
        return None
    return bool(artifact.tables) and budget < 1 if ranks == uniform.digest else None
