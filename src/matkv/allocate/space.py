"""What a search may do: which heads shrink together, and in which steps.

A unit is a set of heads of one layer that share one rank. Its ladder lists the ranks it may have,
largest first; its level is a place on that ladder. No model is needed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matkv.allocate.config import Constraints
from matkv.errors import BudgetError, RankError
from matkv.ranks import SIDES, Cell, Geometry, RankTable, check_budget, default_step

Levels = tuple[int, ...]  # of every unit
TINY = 1e-9  # keeps a budget of exactly k columns at k despite rounding


@dataclass(frozen=True)
class Unit:
    """Heads of one layer that share a rank, and the ranks they may have, largest first."""

    cells: tuple[Cell, ...]
    ladder: tuple[int, ...]

    @property
    def layer(self) -> int:
        return self.cells[0][0]

    def columns(self, start: int, end: int) -> int:
        """Columns given up between two levels."""
        return len(self.cells) * (self.ladder[start] - self.ladder[end])


@dataclass(frozen=True)
class Space:
    """The rank tables of a geometry that constraints allow."""

    geometry: Geometry
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, geometry: Geometry, constraints: Constraints) -> Space:
        """Units of every compressed layer that is not protected.

        Raises:
            RankError: a protected layer does not exist, or the limits leave no rank.
        """
        units = units_of(geometry, constraints)
        if not any(len(unit.ladder) > 1 for unit in units):
            raise RankError("the constraints leave no rank to give up")
        return cls(geometry, units)

    @property
    def top(self) -> Levels:
        return (0,) * len(self.units)

    @property
    def smallest(self) -> float:
        """The smallest budget any table has."""
        return self.table(tuple(len(unit.ladder) - 1 for unit in self.units)).budget

    def table(self, levels: Sequence[int]) -> RankTable:
        units = zip(self.units, levels, strict=True)
        ranks = {cell: unit.ladder[level] for unit, level in units for cell in unit.cells}
        return RankTable.full(self.geometry).changed(ranks)

    def check_budget(self, budget: float) -> None:
        """Make sure that some table holds `budget`.

        Raises:
            BudgetError: it is outside (0, 1] or below what the constraints allow.
        """
        check_budget(budget)
        if budget < self.smallest - TINY:
            raise BudgetError(
                f"budget {budget:g} is below {self.smallest:.4g}, the smallest that the "
                "constraints allow: raise it, lower min_rank or protect fewer layers"
            )


def units_of(geometry: Geometry, constraints: Constraints) -> tuple[Unit, ...]:
    """The heads that go together, of every compressed layer that is not protected.

    Raises:
        RankError: a protected layer does not exist, all are, or the limits leave no rank.
    """
    compressed, units = geometry.compressed, []
    for layer in constraints.protected:
        if layer not in compressed:
            raise RankError(
                f"protected layer {layer} is not among the compressed layers {compressed}"
            )
    for layer in sorted(set(compressed) - set(constraints.protected)):
        shape = geometry.layers[layer]
        ladder = constraints.ladder(
            shape.head_dim, constraints.step or default_step(shape.head_dim)
        )
        for cells in _cells(layer, shape.kv_heads, constraints):
            units.append(Unit(cells, ladder))
    if not units:
        raise RankError("the constraints leave no rank to give up: protect fewer layers")
    return tuple(units)


def _cells(layer: int, kv_heads: int, constraints: Constraints) -> Iterator[tuple[Cell, ...]]:
    side_groups = (SIDES,) if constraints.equal_sides else tuple((side,) for side in SIDES)
    heads = range(kv_heads)
    head_groups = (tuple(heads),) if constraints.equal_heads else tuple((h,) for h in heads)
    for sides in side_groups:
        for group in head_groups:
            yield tuple((layer, side, head) for side in sides for head in group)
