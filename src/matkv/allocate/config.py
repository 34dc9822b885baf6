"""The settings of a search for ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from matkv.codes import WIDTHS
from matkv.errors import BudgetError, RankError
from matkv.ranks import Budget
from matkv.settings import Count, Few, Many, Number, Positive, Seed, settings


def _as_bits(value: int) -> int:
    if value not in (*WIDTHS, 0):
        raise RankError(f"bits {value} must be 16, 8, 4, 2, or 0 for none")
    return value


def _as_width(value: int) -> int:
    if value not in WIDTHS:
        raise BudgetError(f"codes {value} must be 16, 8, 4 or 2 bits")
    return value


Bits = Annotated[int, Field(ge=0), AfterValidator(_as_bits)]
Width = Annotated[int, Field(gt=0), AfterValidator(_as_width)]


@settings(RankError)
class Constraints:
    """What rank tables a search may make; protected layers have no largest rank.

    Raises:
        RankError: a number is out of range, or the limits leave no rank.
    """

    step: Count | None = Field(
        default=None,
        description="columns given up at a time; an eighth of the head dim unless given",
    )
    multiple: Count = Field(default=1, description="ranks are multiples of this, or the head dim")
    min_rank: Number | None = Field(
        default=None, description="smallest rank; the smallest trained unless given"
    )
    max_rank: Number | None = Field(default=None, description="largest rank")
    equal_sides: bool = Field(default=False, description="key rank = value rank")
    equal_heads: bool = Field(default=False, description="one rank for a layer's heads of a side")
    protected: Many[Number] = Field(default=(), description="layer to keep at full rank")
    edge_bits: Bits = Field(
        default=0, description="codes: least bits of any column in the first and the last layer"
    )

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < (self.min_rank or 0):
            raise RankError(f"max_rank {self.max_rank} is below min_rank {self.min_rank}")

    def above(self, trained: int) -> Constraints:
        """These constraints, `min_rank` at the smallest trained rank where it is not given."""
        if self.min_rank is not None:
            return self
        lowest = trained if self.max_rank is None else min(trained, self.max_rank)
        return replace(self, min_rank=lowest)

    def grain(self, head_dim: int) -> int:
        """Columns of equal width that go together where bits are allocated."""
        step = self.step or max(1, head_dim // 16)
        return min(head_dim, -(-step // self.multiple) * self.multiple)

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


def as_fraction(given: object) -> object:
    """0.05 from "5%" or "0.05"; what is no text is left as it is."""
    if not isinstance(given, str):
        return given
    try:
        return float(given[:-1]) / 100 if given.endswith("%") else float(given)
    except ValueError:
        raise BudgetError(
            f"{given!r} must be a percentage, as 5%, or a fraction, as 0.05"
        ) from None


@settings(BudgetError)
class AllocateConfig:
    """How to allocate.

    The search reads `search_tokens` of text in one go: fisher for every expansion, greedy in every
    round; the tables are verified on the `held_out_tokens` after it.

    Raises:
        BudgetError: a value is out of range; the message says which is allowed.
    """

    method: Literal["fisher", "greedy", "uniform"] = Field(
        default="fisher", description="fisher, greedy or uniform"
    )
    budgets: Many[Budget] | None = Field(
        default=None, description="fractions of cache bytes to keep; every eighth by default"
    )
    codes: Many[Width] | None = Field(
        default=None,
        description="fisher: bits that a column may have; 16, 8, 4 and 2 by default, 16 alone for "
        "ranks without codes",
    )
    constraints: Constraints = Field(default_factory=Constraints)
    max_kl: Positive | None = Field(
        default=None, description="also the smallest cache within this KL, in nats a token"
    )
    max_perplexity_increase: Annotated[Positive, BeforeValidator(as_fraction)] | None = Field(
        default=None, description="also the smallest cache within this increase, as 5% or 0.05"
    )
    search_tokens: Count = Field(default=2048, description="tokens read at a time")
    held_out_tokens: Count = Field(
        default=4096, description="tokens on which the tables are verified"
    )
    expansions: Annotated[int, Field(gt=0, le=1024)] = Field(
        default=36,
        description="fisher: points from 100% to 12.5%, in equal relative steps; with codes texts "
        "to read, 8 at most",
    )
    samples: Few = Field(
        default=1, description="fisher, ranks alone: label sequences drawn for a sequence of text"
    )
    blend: bool = Field(
        default=True,
        description="fisher, ranks alone: draw the tables towards equal ranks where that is better",
    )
    drops: Few = Field(default=1, description="greedy: drops a round; the paper takes one")
    batched: Few = Field(default=1, description="greedy: tables that go through the model together")
    seed: Seed = Field(default=0, description="fisher: seed of the labels")

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that a column may have beside none."""
        return self.codes or WIDTHS

    @property
    def has_codes(self) -> bool:
        """Whether columns may be kept as codes; greedy and uniform know ranks alone."""
        return self.method == "fisher" if self.codes is None else bool({8, 4, 2} & {*self.codes})

    def __post_init__(self) -> None:
        if self.codes == ():
            raise BudgetError("no bits are given: name some, or leave codes out for all")
        if self.has_codes and self.method != "fisher":
            raise BudgetError(f"method {self.method} finds ranks alone: use codes 16, or fisher")
        if self.budgets == ():
            raise BudgetError("no budget is given: name one, or leave budgets out for all eighths")
