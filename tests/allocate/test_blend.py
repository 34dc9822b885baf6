"""Blends of searched and equal ranks."""

from __future__ import annotations

import pytest

from matkv.allocate.blend import SHARES, blended
from matkv.allocate.config import Constraints
from matkv.allocate.descent import Descent, toward
from matkv.allocate.space import Space
from matkv.ranks import SIDES, Geometry, LayerShape, RankTable

SHAPE = LayerShape(kv_heads=2, head_dim=16)
GEOMETRY = Geometry(query_heads=4, layers=(SHAPE, SHAPE))
BUDGETS = (0.75, 0.5, 0.25)


def searched(constraints: Constraints) -> Descent:
    """A path that empties unit after unit."""
    space = Space.of(GEOMETRY, constraints)
    drops = [i for i, unit in enumerate(space.units) for _ in unit.ladder[1:]]
    return Descent(space, tuple(drops))


def spread(table: RankTable) -> float:
    ranks = [rank for *_, rank in table.compressed_ranks()]
    return sum((rank - sum(ranks) / len(ranks)) ** 2 for rank in ranks)


@pytest.mark.parametrize(
    "constraints",
    [Constraints(step=2), Constraints(step=4, min_rank=4), Constraints(step=2, equal_sides=True)],
)
@pytest.mark.parametrize("wanted", SHARES)
def test_blends_hold_their_budgets_and_are_nested(constraints: Constraints, wanted: float) -> None:
    path = searched(constraints)
    own = {b: spread(path.table(path.count_for(b))) for b in BUDGETS}

    def loss(table: RankTable) -> float:
        nearest = min(BUDGETS, key=lambda b: abs(b - table.budget))
        return abs(spread(table) - wanted**2 * own[nearest])

    blend, shares = blended(path, BUDGETS, loss)
    assert set(shares) == set(BUDGETS)
    before = RankTable.full(GEOMETRY)
    for budget in BUDGETS:
        table = blend.table(blend.count_for(budget))
        assert budget - 0.07 < table.budget <= budget
        for side in SIDES:
            for ranks, larger in zip(table.side(side), before.side(side), strict=True):
                assert all(a <= b for a, b in zip(ranks, larger, strict=True))
        before = table


def test_with_no_share_ranks_are_equal_and_with_all_of_it_those_searched() -> None:
    path = searched(Constraints(step=2))
    equal, _ = blended(path, BUDGETS, spread)
    own, _ = blended(path, BUDGETS, lambda table: -spread(table))
    for budget in BUDGETS:
        assert equal.table(equal.count_for(budget)) == RankTable.uniform(GEOMETRY, budget)
        assert own.table(own.count_for(budget)) == path.table(path.count_for(budget))


def test_drops_go_first_where_ranks_lie_furthest_above_their_aims() -> None:
    path = Descent(Space.of(GEOMETRY, Constraints(step=8)))
    aims = [16.0] * 7 + [0.0]
    drops = toward(path, aims, 1 - 2 / 16)
    assert drops == [7, 7]
    assert path.extended(toward(path, aims, 0.5)).table().budget == 0.5
