"""The settings of a search for ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from matkv.errors import BudgetError, MatkvError
from matkv.ranks import check_budget
from matkv.search import Constraints

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
