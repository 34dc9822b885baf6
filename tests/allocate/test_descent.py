"""The decrement search, without a model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from matkv.allocate.config import Constraints
from matkv.allocate.descent import Descent, descend, uniform_descent
from matkv.allocate.space import Space
from matkv.errors import RankError
from matkv.ranks import SIDES, Geometry, LayerShape, RankTable

GEOMETRY = Geometry(
    query_heads=4,
    layers=(
        LayerShape(kv_heads=2, head_dim=12),
        LayerShape(kv_heads=2, head_dim=12, window=8),
        LayerShape(kv_heads=2, head_dim=12),
    ),
)
SMALL = Geometry(query_heads=1, layers=(LayerShape(kv_heads=1, head_dim=4),) * 2)
CONSTRAINTS = [
    Constraints(),
    Constraints(step=1),
    Constraints(step=5),
    Constraints(step=3, multiple=4),
    Constraints(step=2, min_rank=3, max_rank=9),
    Constraints(step=2, equal_sides=True),
    Constraints(step=2, equal_heads=True),
    Constraints(step=2, equal_heads=True, equal_sides=True, multiple=2),
    Constraints(step=1, protected=(2,), min_rank=1),
]


def random_costs(space: Space, seed: int, *, convex: bool) -> list[list[float]]:
    """Rising costs of lowering every unit by 0, 1, ... levels from the top."""
    rng = random.Random(seed)
    costs = []
    for unit in space.units:
        steps = [rng.random() * width for width in _widths(unit.ladder)]
        if convex:
            slopes = sorted(rng.random() for _ in steps)
            steps = [s * w for s, w in zip(slopes, _widths(unit.ladder), strict=True)]
        costs.append(list(itertools.accumulate(steps, initial=0.0)))
    return costs


def _widths(ladder: Sequence[int]) -> list[int]:
    return [above - below for above, below in itertools.pairwise(ladder)]


def full_path(constraints: Constraints, seed: int = 0) -> Descent:
    space = Space.of(GEOMETRY, constraints)
    path = Descent(space)
    costs = random_costs(space, seed, convex=False)
    return path.extended(descend(path, costs, space.smallest))


@pytest.mark.parametrize("constraints", CONSTRAINTS)
def test_every_table_respects_the_constraints(constraints: Constraints) -> None:
    path = full_path(constraints)
    for count in path.counts():
        table = path.table(count)
        for layer, _, head, rank in table.compressed_ranks():
            key, value = table.key[layer], table.value[layer]
            if layer in constraints.protected:
                assert rank == 12
                continue
            assert (constraints.min_rank or 0) <= rank <= (constraints.max_rank or 12)
            assert rank % constraints.multiple == 0
            assert not constraints.equal_sides or key[head] == value[head]
            assert not constraints.equal_heads or len(set(key)) == len(set(value)) == 1
    assert path.table().budget == pytest.approx(path.space.smallest)


@pytest.mark.parametrize("constraints", CONSTRAINTS)
def test_the_budget_is_never_exceeded_and_tables_are_nested(constraints: Constraints) -> None:
    path = full_path(constraints)
    above: RankTable | None = None
    for percent in range(100, 0, -1):
        count = path.count_for(percent / 100)
        if count is None:
            assert percent / 100 < path.space.smallest
            continue
        table = path.table(count)
        assert table.budget <= percent / 100 + 1e-9
        assert table.budget == pytest.approx(path.budgets()[count])
        if above is not None:
            pairs = zip(table.compressed_ranks(), above.compressed_ranks(), strict=True)
            assert all(now[3] <= before[3] for now, before in pairs)
        above = table


def test_the_budget_is_used_up_to_one_step() -> None:
    path = full_path(Constraints(step=1))
    for budget in (0.9, 0.5, 0.25):
        assert budget - path.table(path.count_for(budget)).budget < 1 / 96 + 1e-9


def test_convex_costs_give_the_cheapest_table_of_every_size() -> None:
    space = Space.of(SMALL, Constraints(step=1))
    costs = random_costs(space, 3, convex=True)
    path = Descent(space)
    path = path.extended(descend(path, costs, 0.01))
    cheapest: dict[int, float] = {}
    for levels in itertools.product(*(range(len(unit.ladder)) for unit in space.units)):
        cost = sum(one[level] for one, level in zip(costs, levels, strict=True))
        cheapest[sum(levels)] = min(cost, cheapest.get(sum(levels), cost))
    for count in path.counts():
        found = sum(one[level] for one, level in zip(costs, path.levels(count), strict=True))
        assert found == pytest.approx(cheapest[count])


def test_a_cheap_drop_behind_a_dear_one_is_seen() -> None:
    space = Space.of(SMALL, Constraints(step=2, protected=(1,)))
    costs = [[0.0, 3.0, 3.1], [0.0, 2.0, 4.0]]
    assert descend(Descent(space), costs, 0.75) == [0, 0]


def test_reach_limits_one_unit() -> None:
    space = Space.of(SMALL, Constraints(step=1))
    costs = [[0.0] * 5, *[[0.0, 9.0, 18.0, 27.0, 36.0]] * 3]
    assert descend(Descent(space), costs, 0.75) == [0, 0, 0, 0]
    drops = descend(Descent(space), costs, 0.75, reach=0.4)
    assert drops.count(0) == 2 and len(drops) == 4


def test_descending_twice_equals_descending_once() -> None:
    space = Space.of(GEOMETRY, Constraints(step=1))
    costs = random_costs(space, 5, convex=True)
    once = Descent(space).extended(descend(Descent(space), costs, 0.3))
    half = Descent(space).extended(descend(Descent(space), costs, 0.6))
    rest = [
        [c - one[level] for c in one[level:]]
        for one, level in zip(costs, half.levels(), strict=True)
    ]
    assert half.extended(descend(half, rest, 0.3)).levels() == once.levels()


def test_uniform_tables_have_one_rank() -> None:
    path = uniform_descent(Space.of(GEOMETRY, Constraints(step=3)))
    ranks = [{rank for *_, rank in path.table(n).compressed_ranks()} for n in path.counts()]
    assert ranks == [{12}, {9}, {6}, {3}, {0}]
    assert path.table(path.count_for(0.6)) == RankTable.uniform(GEOMETRY, 0.6, step=3)


def test_deepest_finds_the_last_table_that_holds() -> None:
    path = full_path(Constraints(step=1))
    for limit in (1.0, 0.77, 0.5, 0.31, 0.0):

        def holds(table: RankTable, limit: float = limit) -> bool:
            return table.budget >= limit

        expected = max(n for n, budget in enumerate(path.budgets()) if budget >= limit)
        assert path.deepest(holds) == expected
    assert path.deepest(lambda table: False) is None


def test_protected_and_sliding_layers_stay_full() -> None:
    table = full_path(Constraints(protected=(0,))).table()
    for side in SIDES:
        assert table.side(side) == ((12, 12), (12, 12), (0, 0))


def test_a_path_checks_its_drops() -> None:
    space = Space.of(SMALL, Constraints(step=2))
    with pytest.raises(RankError, match="dropped 3 times"):
        Descent(space, (0, 0, 0))
    with pytest.raises(RankError, match="unit 9"):
        Descent(space, (9,))
