"""Decrement search over rank tables: what may shrink together, in which steps, at what cost.

A unit is a set of heads of one layer that share one rank. Its ladder lists the ranks it may have,
largest first; its level is a place on that ladder. A search starts with every unit at level 0 and
makes a path of drops, each taking one unit one level down, so that all tables on it are nested.
No model is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from matkv.errors import BudgetError, RankError
from matkv.ranks import SIDES, Geometry, RankTable, Side, check_budget

Cell = tuple[int, Side, int]  # layer, side, head
Levels = tuple[int, ...]  # of every unit
TINY = 1e-9  # keeps a budget of exactly k columns at k despite rounding


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
        """Units of every growing layer that is not protected.

        Raises:
            RankError: a protected layer does not exist, or the limits leave no rank.
        """
        growing = geometry.growing
        for layer in constraints.protected:
            if layer not in growing:
                raise RankError(
                    f"protected layer {layer} is not among the growing layers {growing}"
                )
        units = []
        for layer in sorted(set(growing) - set(constraints.protected)):
            shape = geometry.layers[layer]
            step = constraints.step or max(1, shape.head_dim // 8)
            ladder = constraints.ladder(shape.head_dim, step)
            for cells in _cells(layer, shape.kv_heads, constraints):
                units.append(Unit(cells, ladder))
        if not any(len(unit.ladder) > 1 for unit in units):
            raise RankError("the constraints leave no rank to give up")
        return cls(geometry, tuple(units))

    @property
    def top(self) -> Levels:
        return (0,) * len(self.units)

    @property
    def smallest(self) -> float:
        """The smallest budget any table has."""
        return self.table(tuple(len(unit.ladder) - 1 for unit in self.units)).budget

    def table(self, levels: Sequence[int]) -> RankTable:
        full = RankTable.full(self.geometry)
        sides = {side: [list(ranks) for ranks in full.side(side)] for side in SIDES}
        for unit, level in zip(self.units, levels, strict=True):
            for layer, side, head in unit.cells:
                sides[side][layer][head] = unit.ladder[level]
        key, value = (tuple(tuple(ranks) for ranks in sides[side]) for side in SIDES)
        return RankTable(self.geometry, key, value)

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


@dataclass(frozen=True)
class Path:
    """A search's result: the unit that shrinks by one level, drop by drop.

    `stops` lists the numbers of drops after which there is a table to use; None for every number.

    Raises:
        RankError: a drop names no unit, or one that is at its lowest rank already.
    """

    space: Space
    drops: tuple[int, ...] = ()
    stops: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for unit, level in enumerate(self.levels(len(self.drops))):
            if level >= len(self.space.units[unit].ladder):
                raise RankError(f"unit {unit} is dropped {level} times, below its lowest rank")

    def levels(self, count: int | None = None) -> Levels:
        """Levels after the first `count` drops, all of them unless given."""
        levels = list(self.space.top)
        for unit in self.drops[:count]:
            if not 0 <= unit < len(levels):
                raise RankError(f"a drop names unit {unit} of {len(levels)}")
            levels[unit] += 1
        return tuple(levels)

    def table(self, count: int | None = None) -> RankTable:
        return self.space.table(self.levels(count))

    def extended(self, drops: Sequence[int]) -> Path:
        return replace(self, drops=(*self.drops, *drops))

    def until(self, budget: float, drops: list[int]) -> list[int]:
        """The first of further `drops` after which `budget` holds, all where it never does."""
        count = self.extended(drops).count_for(budget)
        return drops if count is None else drops[: max(0, count - len(self.drops))]

    def counts(self) -> Sequence[int]:
        """Numbers of drops after which there is a table to use."""
        return range(len(self.drops) + 1) if self.stops is None else self.stops

    def budgets(self) -> list[float]:
        """Budget after 0, 1, 2, ... drops."""
        units, levels = self.space.units, list(self.space.top)
        full = RankTable.full(self.space.geometry).bytes_per_token(torch.int8)
        left = self.table(0).bytes_per_token(torch.int8)
        budgets = [left / full]
        for unit in self.drops:
            left -= units[unit].columns(levels[unit], levels[unit] + 1)
            levels[unit] += 1
            budgets.append(left / full)
        return budgets

    def count_for(self, budget: float) -> int | None:
        """Fewest drops that hold `budget`; None where the path ends above it."""
        budgets = self.budgets()
        return next((n for n in self.counts() if budgets[n] <= budget + TINY), None)

    def deepest(self, holds: Callable[[RankTable], bool]) -> int | None:
        """Most drops whose table still `holds`, by bisection; None where not even the first does.

        Exact where a table that does not hold is never followed by one that does.
        """
        counts = self.counts()
        good, bad = -1, len(counts)
        while bad - good > 1:
            middle = (good + bad) // 2
            if holds(self.table(counts[middle])):
                good = middle
            else:
                bad = middle
        return None if good < 0 else counts[good]


def uniform_path(space: Space) -> Path:
    """All units shrink together: a table after every whole round."""
    drops: list[int] = []
    stops = [0]
    for level in range(1, max(len(unit.ladder) for unit in space.units)):
        drops += [index for index, unit in enumerate(space.units) if level < len(unit.ladder)]
        stops.append(len(drops))
    return Path(space, tuple(drops), tuple(stops))


def descend(
    path: Path, costs: Sequence[Sequence[float]], budget: float, *, reach: float = 1.0
) -> list[int]:
    """Cheapest drops per column until `budget` holds, for costs that add up over units.

    `costs[unit][k]` is the estimated cost of lowering a unit by k levels from the path's end,
    `costs[unit][0] = 0`. Drops that follow one another on a unit are taken together where the later
    ones are cheaper (the lower convex hull of the costs), which makes every table on the way the
    cheapest of its size, up to one such group. `reach` is the share of its ladder that one unit may
    give up, at least one level; the drops end above `budget` where it does not suffice.
    """
    levels = path.levels()
    steps: list[tuple[float, int, int, int]] = []
    for index, (unit, level) in enumerate(zip(path.space.units, levels, strict=True)):
        most = max(1, int(reach * len(unit.ladder)))
        end = min(len(unit.ladder) - 1, level + most)
        widths = [unit.columns(level, below) for below in range(level, end + 1)]
        hull = _hull(costs[index], widths)
        steps += [(slope, index, first, last) for slope, first, last in hull]
    drops: list[int] = []
    for _, index, first, last in sorted(steps):
        drops += [index] * (last - first)
    return path.until(budget, drops)


def toward(path: Path, ranks: Sequence[float], budget: float) -> list[int]:
    """Drops until `budget` holds, first of the units that lie furthest above their `ranks`."""
    steps: list[tuple[float, int]] = []
    units = zip(path.space.units, path.levels(), ranks, strict=True)
    for index, (unit, start, rank) in enumerate(units):
        steps += [
            (rank - unit.ladder[level], index) for level in range(start, len(unit.ladder) - 1)
        ]
    drops = [index for _, index in sorted(steps)]
    return path.until(budget, drops)


def _hull(costs: Sequence[float], widths: Sequence[int]) -> list[tuple[float, int, int]]:
    """(cost per column, first level, last level) along the lower convex hull, slopes rising."""
    hull: list[tuple[float, int, int]] = []
    for last in range(1, len(widths)):
        first = last - 1
        slope = (costs[last] - costs[first]) / (widths[last] - widths[first])
        while hull and hull[-1][0] >= slope:
            first = hull.pop()[1]
            slope = (costs[last] - costs[first]) / (widths[last] - widths[first])
        hull.append((slope, first, last))
    return hull


def _cells(layer: int, kv_heads: int, constraints: Constraints) -> Iterator[tuple[Cell, ...]]:
    side_groups = (SIDES,) if constraints.equal_sides else tuple((side,) for side in SIDES)
    heads = range(kv_heads)
    head_groups = (tuple(heads),) if constraints.equal_heads else tuple((h,) for h in heads)
    for sides in side_groups:
        for group in head_groups:
            yield tuple((layer, side, head) for side in sides for head in group)
