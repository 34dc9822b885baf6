"""Tables of ranks and bits: measured damage, one price for all columns, and the truth about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matkv.allocate.bits import CHOICES, Waterline
from matkv.allocate.config import AllocateConfig
from matkv.allocate.divergence import Text
from matkv.allocate.noise import measure_noise
from matkv.allocate.rounds import Rounds
from matkv.allocate.verify import Verifier, own_budget
from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Check
from matkv.errors import BudgetError
from matkv.progress import OnProgress
from matkv.ranks import Cell, Geometry, RankTable

# What one search offers unless budgets are given: a curve from half of the bytes to a sixteenth.
CURVE = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.09375, 0.0625)
# What a dropped column may cost beside the noise it is counted as; the best by true divergence.
DROPPING = (1.0, 2.0, 4.0)
# Texts whose gradients are taken: more change the tables by less than the texts differ.
TEXTS = 8
BISECTIONS = 10
# Down to this budget what columns are worth is as at the full cache.
HALF = 0.5


def allocate_codes(
    model: PreTrainedModel,
    artifact: Artifact,
    held_out: Text,
    texts: Sequence[Text],
    config: AllocateConfig,
    budgets: Sequence[float],
    on_progress: OnProgress | None,
) -> tuple[Artifact, dict[float, RankTable], tuple[Check, ...]]:
    """The artifact with quantizers, tables by budget, and what was measured of them.

    Raises:
        BudgetError: the constraints allow no table for a budget, or none holds an error limit.
    """
    read = list(texts[:TEXTS])
    artifact, damage = _damage(model, artifact, read, config, min(budgets), on_progress)
    rounds = Rounds(model, artifact, read, config)
    lines = [
        Waterline(
            artifact.geometry,
            damage,
            config.constraints,
            config.widths,
            dropping=one,
        )
        for one in DROPPING
    ]
    line = _best(lines, rounds.verifier(read[-1]), sorted(budgets)[:3])
    read[-1].forget_teacher()
    tables = line.tables(budgets)
    verifier = rounds.verifier(held_out)
    for error in ("kl", "perplexity_increase"):
        limit = getattr(config, f"max_{error}")
        if limit is not None:
            table = _smallest(line, verifier, error, limit)
            tables[own_budget(table)] = table
    checks = tuple(verifier.check(*named) for named in sorted(tables.items()))
    return artifact, tables, checks


def _damage(
    model: PreTrainedModel,
    artifact: Artifact,
    texts: list[Text],
    config: AllocateConfig,
    smallest: float,
    on_progress: OnProgress | None,
) -> tuple[Artifact, dict[Cell, Tensor]]:
    """The artifact with quantizers, and the damage of every column [DW] on the way to a budget.

    What a column is worth changes with what is gone already: damage is measured at the full cache
    and again at twice the smallest budget, and counts as the geometric mean.
    """
    measured = partial(measure_noise, model, texts=texts, seed=config.seed, on_progress=on_progress)
    artifact, at_full = measured(artifact)
    if 2 * smallest >= HALF:
        return artifact, at_full
    line = Waterline(artifact.geometry, at_full, config.constraints, config.widths)
    _, on_the_way = measured(artifact, at=line.table(2 * smallest))
    return artifact, {cell: (one * on_the_way[cell]).sqrt() for cell, one in at_full.items()}


def smallest_with_codes(geometry: Geometry, config: AllocateConfig) -> float:
    """The smallest budget that the constraints allow."""
    nothing = {
        (layer, side, head): torch.zeros(dim, len(CHOICES))
        for layer, side, head, dim in RankTable.full(geometry).compressed_ranks()
    }
    return Waterline(geometry, nothing, config.constraints, config.widths).at(1.0).budget


def _best(lines: Sequence[Waterline], verifier: Verifier, budgets: Sequence[float]) -> Waterline:
    """The one whose tables of these budgets diverge least, by the geometric mean."""

    def divergence(line: Waterline) -> float:
        found = [verifier.divergence(line.table(budget)).kl for budget in budgets]
        return sum(math.log(max(kl, 1e-9)) for kl in found)

    return min(lines, key=divergence)


def _smallest(line: Waterline, verifier: Verifier, error: str, limit: float) -> RankTable:
    """The smallest table whose `error`, a field of `Divergence`, is within `limit`.

    Raises:
        BudgetError: not even the largest table is.
    """

    def holds(table: RankTable) -> bool:
        measured: float = getattr(verifier.divergence(table), error)
        return measured <= limit

    high, low = 0.0, math.log(max(line.at(2.0**20).budget, 1e-4))
    best = line.at(0.0)
    if not holds(best):
        raise BudgetError(f"not even the largest table holds max_{error} {limit:g}: raise it")
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        table = line.table(math.exp(middle))
        if holds(table):
            high, best = middle, table
        else:
            low = middle
    return best
