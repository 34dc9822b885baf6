"""A path of drops through the space of rank tables, from full rank down.

A search starts with every unit at level 0, and each drop takes one unit one level down, so that all
tables on the path are nested. No model is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from matkv.allocate.space import TINY, Levels, Space
from matkv.errors import RankError
from matkv.ranks import RankTable


@dataclass(frozen=True)
class Descent:
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

    def extended(self, drops: Sequence[int]) -> Descent:
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
        full, left = self.space.geometry.columns, self.table(0).columns
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


def uniform_descent(space: Space) -> Descent:
    """All units shrink together: a table after every whole round."""
    drops: list[int] = []
    stops = [0]
    for level in range(1, max(len(unit.ladder) for unit in space.units)):
        drops += [index for index, unit in enumerate(space.units) if level < len(unit.ladder)]
        stops.append(len(drops))
    return Descent(space, tuple(drops), tuple(stops))


def descend(
    path: Descent, costs: Sequence[Sequence[float]], budget: float, *, reach: float = 1.0
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


def toward(path: Descent, ranks: Sequence[float], budget: float) -> list[int]:
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
