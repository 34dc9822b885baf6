"""Bits by what they are worth: least damage, nested tables, and constraints."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from matkv.allocate.bits import CHOICES, FORBIDDEN, Waterline, _falling
from matkv.allocate.config import Constraints
from matkv.codes import WIDTHS
from matkv.errors import BudgetError, RankError
from matkv.ranks import SIDES, Cell, Geometry, LayerShape, RankTable

GEOMETRY = Geometry(
    query_heads=4,
    layers=tuple(LayerShape(kv_heads=2, head_dim=8, window=w) for w in (None, 16, None, None)),
)
ERRORS = torch.tensor([0.0, 1e-4, 0.012, 0.12, 1.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def damage() -> dict[Cell, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        (layer, side, head): torch.rand(8, 1, generator=generator).double().exp2()
        * torch.logspace(0, -3, 8, dtype=torch.float64)[:, None]
        * ERRORS
        for layer in GEOMETRY.compressed
        for side in SIDES
        for head in range(2)
    }


def line(damage: dict[Cell, Tensor], widths: tuple[int, ...] = WIDTHS, **limits: Any) -> Waterline:
    return Waterline(GEOMETRY, damage, Constraints(**{"step": 1} | limits), widths)


def test_widths_fall_and_cost_least_of_all_that_fall() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        cost_KW = torch.rand(4, len(CHOICES), generator=generator, dtype=torch.float64)
        found = _falling(cost_KW)
        assert found == sorted(found)  # later choices are narrower
        chains = (c for c in product(range(len(CHOICES)), repeat=4) if list(c) == sorted(c))
        best = min(chains, key=lambda c: float(sum(cost_KW[k, w] for k, w in enumerate(c))))
        assert found == list(best)


def test_a_table_holds_its_budget_and_wastes_little(damage: dict[Cell, Tensor]) -> None:
    waterline = line(damage)
    for budget in (1.0, 0.7, 0.5, 0.3, 0.2, 0.1):
        table = waterline.table(budget)
        assert table.budget <= budget + 1e-9
        assert table.budget > budget - 0.08
    assert waterline.table(1.0) == RankTable.full(GEOMETRY)


def test_tables_are_nested(damage: dict[Cell, Tensor]) -> None:
    tables = list(line(damage).tables((0.9, 0.6, 0.4, 0.3, 0.2, 0.12, 0.05)).values())
    for larger, smaller in pairwise(tables):
        for layer in GEOMETRY.compressed:
            for side in SIDES:
                pairs = zip(larger.bands(layer, side), smaller.bands(layer, side), strict=True)
                for wide, narrow in pairs:
                    for upto in range(1, 5):  # as many columns of at least each width
                        assert sum(wide[:upto]) >= sum(narrow[:upto])


def test_sixteen_bits_alone_are_ranks(damage: dict[Cell, Tensor]) -> None:
    assert not line(damage, (16,)).table(0.4).coded
    eight = line(damage, (8,)).table(0.3)
    assert {bands[1] for bands in eight.coded.values()} == {sum(b) for b in eight.coded.values()}


def test_constraints_hold(damage: dict[Cell, Tensor]) -> None:
    table = line(damage, protected=(2,), edge_bits=4, min_rank=3, multiple=2).table(0.6)
    for side in SIDES:
        assert table.bands(2, side) == ((8, 0, 0, 0),) * 2
        for layer in (0, 3):
            assert all(sum(b) == 8 and b[3] == 0 for b in table.bands(layer, side))
    equal = line(damage, equal_heads=True, equal_sides=True, max_rank=6).table(0.2)
    for layer in GEOMETRY.compressed:
        (one,) = {bands for side in SIDES for bands in equal.bands(layer, side)}
        assert sum(one) <= 6
    low = line(damage, min_rank=3).table(0.14)
    assert all(sum(bands) >= 3 for bands in low.coded.values())
    coarse = line(damage, multiple=4).table(0.3)
    assert all(count % 4 == 0 for bands in coarse.coded.values() for count in bands)


def test_a_budget_below_the_constraints_is_refused(damage: dict[Cell, Tensor]) -> None:
    with pytest.raises(BudgetError, match="smallest that the constraints allow"):
        line(damage, min_rank=8).table(0.1)
    with pytest.raises(RankError, match="leave no rank"):
        line(damage, protected=GEOMETRY.compressed)


def test_what_dropping_costs_more_is_dropped_later(damage: dict[Cell, Tensor]) -> None:
    plain = Waterline(GEOMETRY, damage, Constraints(step=1), WIDTHS).table(0.15)
    dear = Waterline(GEOMETRY, damage, Constraints(step=1), WIDTHS, dropping=8).table(0.15)
    assert dear.columns > plain.columns
    assert FORBIDDEN > 1e20
