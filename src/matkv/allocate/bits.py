"""Bits for every column by what it is worth, a dropped column being one of no bits.

    damage of a column at b bits = ½ F_j E_j(b)

F_j is the expected square of the gradient of the log-likelihood by the column's latent, a token at
a time, E_j(b) the mean squared error of the quantizer in use; of a dropped column, its energy. One
price λ a bit makes a table: every head takes the widths that minimize damage + λ bits, falling from
its first column to its last. Tables of rising prices are nested, and budgets are prices (reverse
water-filling). No model is needed here.

Shapes: U unit of heads, K group of columns, W width: 16, 8, 4, 2 and 0 bits, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matkv.allocate.config import Constraints
from matkv.allocate.space import TINY, Unit, units_of
from matkv.codes import WIDTHS, Bands, bands_of
from matkv.errors import BudgetError
from matkv.ranks import Cell, Geometry, RankTable, check_budget

CHOICES = (*WIDTHS, 0)
FORBIDDEN = 1e30
HALVINGS = 60


@dataclass(frozen=True)
class UnitBits:
    """A unit's groups of columns, and the damage of each at every width, in nats a token [KW]."""

    cells: tuple[Cell, ...]
    groups: tuple[int, ...]
    damage_KW: Tensor


class Waterline:
    """All tables of bands that constraints allow, by the price of a bit.

    `damage[cell]` is that of a head's columns at every width, [DW]; `widths` those it may have
    beside 0; `dropping` multiplies the damage of a dropped column, which is no noise but a bias.

    Raises:
        RankError: the constraints leave no choice.
    """

    def __init__(
        self,
        geometry: Geometry,
        damage: Mapping[Cell, Tensor],
        constraints: Constraints,
        widths: Iterable[int],
        *,
        dropping: float = 1.0,
    ) -> None:
        self.geometry = geometry
        allowed = {*widths, 0}
        self.units = [
            _unit_bits(geometry, unit, damage, constraints, allowed, dropping)
            for unit in units_of(geometry, constraints)
        ]

    def at(self, price: float) -> RankTable:
        """The table at a price in nats a bit and token."""
        bands: dict[Cell, Bands] = {}
        for one in self.units:
            columns = torch.tensor(one.groups, dtype=torch.float64)
            choice = _falling(one.damage_KW + price * len(one.cells) * _bits(columns))
            widths = [CHOICES[w] for w, n in zip(choice, one.groups, strict=True) for _ in range(n)]
            bands |= dict.fromkeys(one.cells, bands_of(widths))
        return RankTable.banded(self.geometry, bands)

    def table(self, budget: float) -> RankTable:
        """The table of least damage within a budget.

        Raises:
            BudgetError: the smallest table is larger.
        """
        low, high = -80.0, 20.0  # powers of two of the price
        best = self.at(2.0**high)
        check_within(best.budget, budget)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            table = self.at(2.0**middle)
            if table.budget > budget + TINY:
                low = middle
            else:
                high, best = middle, table
        return best

    def tables(self, budgets: Sequence[float]) -> dict[float, RankTable]:
        """`table` of every budget."""
        return {budget: self.table(budget) for budget in budgets}


def check_within(smallest: float, budget: float) -> None:
    """Make sure that a budget is in (0, 1], and not below the smallest there is.

    Raises:
        BudgetError: it is.
    """
    if check_budget(budget) < smallest - TINY:
        raise BudgetError(
            f"budget {budget:g} is below {smallest:.4g}, the smallest that the constraints allow: "
            "raise it, or lower min_rank or edge_bits, or protect fewer layers"
        )


def _bits(columns_K: Tensor) -> Tensor:
    """Bits of groups of so many columns at every width.  [K -> KW]"""
    return columns_K[:, None] * torch.tensor(CHOICES, dtype=torch.float64)


def _unit_bits(
    geometry: Geometry,
    unit: Unit,
    damage: Mapping[Cell, Tensor],
    constraints: Constraints,
    widths: set[int],
    dropping: float,
) -> UnitBits:
    dim = geometry.layers[unit.layer].head_dim
    grain = constraints.grain(dim)
    groups = tuple(min(grain, dim - first) for first in range(0, dim, grain))
    damage_DW = torch.stack([damage[cell].double() for cell in unit.cells]).sum(0)
    damage_KW = torch.stack([part.sum(0) for part in damage_DW.split(grain)])
    damage_KW[:, CHOICES.index(0)] *= dropping
    compressed = geometry.compressed
    is_edge = unit.layer in (compressed[0], compressed[-1])
    for index, width in enumerate(CHOICES):
        if width not in widths or (is_edge and width < constraints.edge_bits):
            damage_KW[:, index] = FORBIDDEN
    first, zero = 0, CHOICES.index(0)
    for k, columns in enumerate(groups):
        if first < (constraints.min_rank or 0):
            damage_KW[k, zero] = FORBIDDEN
        if constraints.max_rank is not None and first + columns > constraints.max_rank:
            damage_KW[k, :zero], damage_KW[k, zero] = FORBIDDEN, 0.0
        first += columns
    return UnitBits(unit.cells, groups, damage_KW)


def _falling(cost_KW: Tensor) -> list[int]:
    """The widths of least cost that never rise from group to group, as places in CHOICES."""
    groups, choices = cost_KW.shape
    cost = cost_KW.tolist()
    total, before = cost[0], []
    for k in range(1, groups):
        least, places = 0, []
        for w in range(choices):
            least = w if total[w] < total[least] else least
            places.append(least)
        before.append(places)
        total = [total[places[w]] + cost[k][w] for w in range(choices)]
    place = min(range(choices), key=total.__getitem__)
    path = [place]
    for places in reversed(before):
        place = places[place]
        path.append(place)
    return path[::-1]
