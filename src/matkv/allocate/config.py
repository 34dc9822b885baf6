"""The settings of a search for ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from matkv.errors import BudgetError, MatkvError, RankError
from matkv.ranks import check_budget


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What rank tables a search may make.

    step         Δ, the columns given up at a time; None for an eighth of the head dim
    multiple     every rank is a multiple of it, or the head dim
    min_rank     no rank is smaller; None for the smallest that the bases were trained at
    max_rank     no rank is larger, protected layers excepted
    equal_sides  a head has one rank for keys and values
    equal_heads  all heads of a layer have one rank (for each side, unless `equal_sides`)
    protected    layers that stay at full width

    Raises:
        RankError: a number is out of range, or the limits leave no rank.
    """

    step: int | None = None
    multiple: int = 1
    min_rank: int | None = None
    max_rank: int | None = None
    equal_sides: bool = False
    equal_heads: bool = False
    protected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, lowest in (("step", 1), ("multiple", 1), ("min_rank", 0), ("max_rank", 0)):
            number = getattr(self, name)
            if number is not None and number < lowest:
                raise RankError(f"{name} {number} must be at least {lowest}")
        if self.max_rank is not None and self.max_rank < (self.min_rank or 0):
            raise RankError(f"max_rank {self.max_rank} is below min_rank {self.min_rank}")

    def above(self, trained: int) -> Constraints:
        """These constraints, `min_rank` at the smallest trained rank where it is not given."""
        if self.min_rank is not None:
            return self
        lowest = trained if self.max_rank is None else min(trained, self.max_rank)
        return replace(self, min_rank=lowest)

    def ladder(self, head_dim: int, step: int) -> tuple[int, ...]:
        """Ranks a head may have, largest first.

        Raises:
            RankError: no rank lies within the limits.
        """
        m = self.multiple
        lowest = min(head_dim, -(-(self.min_rank or 0) // m) * m)
        rank = head_dim
        if self.max_rank is not None and self.max_rank < head_dim:
            rank = self.max_rank // m * m
        if rank < lowest:
            raise RankError(
                f"no multiple of {m} lies in {self.min_rank or 0}..{self.max_rank}: change "
                "min_rank, max_rank or multiple"
            )
        ranks = [rank]
        while rank > lowest:
            lower = (rank - step) // m * m
            rank = max(lowest, lower)
            ranks.append(rank)
        return tuple(ranks)


Method = Literal["fisher", "greedy", "uniform"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class AllocateConfig:
    """How to allocate.

    budgets                   tables to store; None for every eighth that the constraints allow
    max_kl                    also store the smallest cache whose KL, in nats a token, stays below
    max_perplexity_increase   the same for perplexity: 0.05 for 5%
    search_tokens             text a search reads in one go: fisher's expansions, greedy's rounds
    held_out_tokens           text after it on which the tables are verified
    expansions                fisher: points on the way from 100% to 12.5%, in equal relative steps
    samples                   fisher: label sequences drawn for a sequence of text
    blend                     fisher: draw the tables towards equal ranks where that is better, by
                              the loss that trained the bases
    drops                     greedy: drops taken a round; the paper takes one
    batched                   greedy: tables that go through the model together
    """

    method: Method = "fisher"
    budgets: tuple[float, ...] | None = None
    constraints: Constraints = field(default_factory=Constraints)
    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    search_tokens: int = 2048
    held_out_tokens: int = 4096
    expansions: int = 36
    samples: int = 1
    blend: bool = True
    drops: int = 1
    batched: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MatkvError(f"method {self.method!r} must be one of {', '.join(METHODS)}")
        if self.budgets is not None and not self.budgets:
            raise BudgetError("no budget is given: name one, or leave budgets out for all eighths")
        for budget in self.budgets or ():
            check_budget(budget)
        for name in (
            "search_tokens",
            "held_out_tokens",
            "expansions",
            "samples",
            "drops",
            "batched",
        ):
            if getattr(self, name) < 1:
                raise MatkvError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("max_kl", "max_perplexity_increase"):
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise BudgetError(f"{name} {limit} must be a number above 0")
