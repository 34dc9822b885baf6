"""Blend: draw searched ranks towards equal ones, as far as that measures better.

A search judges what dropping columns costs from little text, and from where bases were trained with
ranks that were mostly close to equal, extreme tables lie far from anything they have seen. Between
the equal ranks of a budget and the searched ones lie tables that are often better than both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from matkv.allocate.descent import Descent, toward
from matkv.allocate.space import Space, Unit
from matkv.ranks import RankTable

# How far to go from equal ranks to searched ones.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def blended(
    path: Descent, budgets: Iterable[float], loss: Callable[[RankTable], float]
) -> tuple[Descent, dict[float, float]]:
    """A path through the best blend at every budget, and how far each goes from equal ranks.

    From the largest budget down, every share in turn leads from the table before to the ranks that
    lie so far between; the one with the smallest `loss` stays. All tables remain nested.
    """
    blend, shares = Descent(path.space), {}
    for budget in sorted(budgets, reverse=True):
        count = path.count_for(budget)
        if count is None:
            continue
        levels = path.levels(count)
        blends = {}
        for share in SHARES:
            ranks = [
                _equal(path.space, unit, budget) * (1 - share) + unit.ladder[level] * share
                for unit, level in zip(path.space.units, levels, strict=True)
            ]
            blends[share] = blend.extended(toward(blend, ranks, budget))
        losses = {share: loss(candidate.table()) for share, candidate in blends.items()}
        shares[budget] = min(losses, key=losses.__getitem__)
        blend = blends[shares[budget]]
    return blend, shares


def _equal(space: Space, unit: Unit, budget: float) -> float:
    """The rank, perhaps between two of the ladder, that a unit has where all have the same."""
    rank = space.geometry.layers[unit.layer].head_dim * budget
    return min(max(rank, unit.ladder[-1]), unit.ladder[0])
