"""Verify: the true divergence of found tables, on text that no search has read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from transformers import PreTrainedModel

from matkv.allocate.descent import Descent, uniform_descent
from matkv.allocate.divergence import Divergence, Gated, Text, add_teacher, measure
from matkv.allocate.space import TINY, Space
from matkv.artifact.history import Check
from matkv.errors import BudgetError
from matkv.ranks import RankTable

logger = logging.getLogger(__name__)


class Verifier:
    """Measures tables on one text; `student` puts the gates in place meanwhile.

    `weights` of divergence and cross-entropy make up the loss by which tables are compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gated: Gated,
        text: Text,
        student: Callable[[], AbstractContextManager[None]],
        weights: tuple[float, float],
    ) -> None:
        self.model, self.gated, self.text, self.student = model, gated, text, student
        self.weights = weights
        add_teacher(model, text)

    def divergence(self, table: RankTable) -> Divergence:
        with self.student():
            return measure(self.model, self.gated, self.text, table)

    def loss(self, table: RankTable) -> float:
        """What training minimizes, over the teacher's, in nats a token."""
        return self.divergence(table).weighted(*self.weights)

    def check(self, budget: float, table: RankTable, measured: Divergence | None = None) -> Check:
        """What an artifact's history keeps of a table."""
        measured = measured or self.divergence(table)
        return Check(
            budget=budget,
            key_share=table.share("key"),
            value_share=table.share("value"),
            kl=measured.kl,
            perplexity_increase=measured.perplexity_increase,
        )

    def entry(self, space: Space, budget: float, table: RankTable) -> Check:
        """`check`, with uniform ranks at the budget beside it."""
        measured = self.divergence(table)
        entry = self.check(budget, table, measured)
        uniform = uniform_descent(space)
        count = uniform.count_for(budget)
        if count is None or uniform.table(count) == table:
            return entry
        equal = self.divergence(uniform.table(count))
        if equal.weighted(*self.weights) < measured.weighted(*self.weights):
            logger.warning("at budget %g uniform ranks are better: search on more text", budget)
        increase = equal.perplexity_increase
        return replace(entry, uniform_kl=equal.kl, uniform_perplexity_increase=increase)

    def smallest(self, path: Descent, error: str, limit: float) -> RankTable:
        """The smallest table on the path whose `error`, a field of `Divergence`, is within `limit`.

        Raises:
            BudgetError: not even the largest table is.
        """

        def holds(table: RankTable) -> bool:
            measured: float = getattr(self.divergence(table), error)
            return measured <= limit

        count = path.deepest(holds)
        if count is None:
            raise BudgetError(f"not even the largest table holds max_{error} {limit:g}: raise it")
        return path.table(count)


def own_budget(table: RankTable) -> float:
    """A table's budget, rounded up to a hundredth of a percent, and one of these at least."""
    return max(1, math.ceil(table.budget * 1e4 - TINY)) / 1e4
