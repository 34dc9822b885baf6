"""Rank tables: what they accept, the bytes they promise, and the tables made from a budget."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from matkv.allocate.config import Constraints
from matkv.allocate.space import Space
from matkv.distill.bases import rank_axes
from matkv.errors import BudgetError, RankError
from matkv.ranks import SIDES, Geometry, LayerShape, RankTable, check_budget, default_step
from tiny import ragged_table

PLAIN = Geometry(query_heads=4, layers=(LayerShape(kv_heads=2, head_dim=16),) * 3)
MIXED = Geometry(
    query_heads=4,
    layers=(
        LayerShape(kv_heads=2, head_dim=16, window=8),
        LayerShape(kv_heads=2, head_dim=16),
        LayerShape(kv_heads=2, head_dim=16, window=8),
        LayerShape(kv_heads=2, head_dim=16),
    ),
)
GEOMETRIES = pytest.mark.parametrize("geometry", [PLAIN, MIXED], ids=["plain", "mixed"])


def test_only_layers_without_a_window_grow() -> None:
    assert PLAIN.compressed == (0, 1, 2)
    assert MIXED.compressed == (1, 3)
    assert (PLAIN.columns, MIXED.columns) == (3 * 64, 2 * 64)


@GEOMETRIES
def test_a_geometry_survives_json(geometry: Geometry) -> None:
    plain = json.loads(json.dumps(geometry.to_json()))
    assert TypeAdapter(Geometry).validate_python(plain) == geometry


@GEOMETRIES
def test_a_table_survives_json(geometry: Geometry) -> None:
    table = ragged_table(geometry)
    assert RankTable.from_json(geometry, json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize("data", [{}, {"key": [[1, 2]] * 3}, {"key": 3, "value": 4}, [], None])
def test_json_that_is_no_table_is_refused(data: Any) -> None:
    with pytest.raises(RankError, match="a rank table is"):
        RankTable.from_json(PLAIN, data)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (((8, 8),) * 2, "2 layers, the model has 3"),
        (((8, 8), (8, 8), (8,)), "layer 2: 1 given, the layer has 2 KV heads"),
        (((8, 8), (8, 17), (8, 8)), r"rank 17 must be a whole number in 0\.\.16"),
        (((8, -1), (8, 8), (8, 8)), "rank -1"),
        (((8, 8), (8, 8), (8, 8.0)), r"rank 8\.0"),
        (((8, 8), (8, 8), (8, True)), "rank True"),
        (((8, 8), (8, 8), (8, "8")), "rank '8'"),
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_ranks_that_do_not_fit_are_refused(side: str, ranks: Any, message: str) -> None:
    fine = ((8, 8),) * 3
    sides = {"key": fine, "value": fine, side: ranks}
    with pytest.raises(RankError, match=message):
        RankTable(PLAIN, sides["key"], sides["value"])


def test_a_sliding_layer_cannot_be_compressed() -> None:
    full = RankTable.full(MIXED)
    with pytest.raises(RankError, match="sliding window stays at 16"):
        RankTable(MIXED, ((8, 16), *full.key[1:]), full.value)


@pytest.mark.parametrize("budget", [0, 0.0, -0.5, 1.5, math.nan, math.inf, True, "0.5", None])
def test_budgets_outside_their_range_are_refused(budget: Any) -> None:
    with pytest.raises(BudgetError, match=f"budget {budget} must be in"):
        check_budget(budget)
    with pytest.raises(BudgetError):
        RankTable.uniform(PLAIN, budget)


@GEOMETRIES
@pytest.mark.parametrize("step", [None, 1, 3, 16])
def test_a_uniform_table_keeps_the_largest_rank_within_its_budget(
    geometry: Geometry, step: int | None
) -> None:
    grain = step or default_step(16)
    for budget in (0.2, 0.29, 0.375, 0.5, 0.99, 1.0):
        if budget * 16 < grain:
            with pytest.raises(BudgetError, match="below one step"):
                RankTable.uniform(geometry, budget, step=step)
            continue
        table = RankTable.uniform(geometry, budget, step=step)
        ranks = {rank for *_, rank in table.compressed_ranks()}
        assert len(ranks) == 1
        rank = ranks.pop()
        assert rank % grain == 0 or budget == 1
        assert table.budget <= budget < table.budget + grain / 16 + (budget == 1)


def test_a_budget_that_is_a_rank_exactly_is_not_rounded_down() -> None:
    geometry = Geometry(query_heads=1, layers=(LayerShape(kv_heads=1, head_dim=100),))
    for rank in range(1, 101):
        assert RankTable.uniform(geometry, rank / 100, step=1).key == ((rank,),)


@pytest.mark.parametrize("step", [0, -1, 17])
def test_a_step_outside_the_head_dim_is_refused(step: int) -> None:
    with pytest.raises(RankError, match=f"step {step} must be in"):
        RankTable.uniform(PLAIN, 0.5, step=step)


def test_every_layer_has_steps_of_its_own_head_dim() -> None:
    shapes = tuple(LayerShape(kv_heads=2, head_dim=dim) for dim in (24, 64, 4))
    geometry = Geometry(query_heads=2, layers=shapes)
    assert [default_step(dim) for dim in (24, 64, 4)] == [3, 8, 1]
    table = RankTable.uniform(geometry, 0.375)
    assert table.key == table.value == ((9, 9), (24, 24), (1, 1))
    steps = {axis.size: axis.grain for axis in rank_axes(geometry)}
    assert steps == {24: 3, 64: 8, 4: 1}
    units = Space.of(geometry, Constraints()).units
    assert {unit.ladder[0] - unit.ladder[1] for unit in units} == {3, 8, 1}


def test_ranks_change_one_by_one() -> None:
    table = RankTable.full(MIXED).changed({(1, "key", 0): 3, (3, "value", 1): 0})
    changed = [place for *place, rank in table.compressed_ranks() if rank < 16]
    assert changed == [[1, "key", 0], [3, "value", 1]]
    assert table.columns == MIXED.columns - 13 - 16
    with pytest.raises(RankError, match="sliding window stays"):
        table.changed({(0, "key", 0): 3})


def test_keys_and_values_have_budgets_of_their_own() -> None:
    table = RankTable.uniform_sides(MIXED, 0.25, 0.75)
    assert (table.share("key"), table.share("value"), table.budget) == (0.25, 0.75, 0.5)


@GEOMETRIES
def test_the_full_table_costs_what_an_uncompressed_cache_costs(geometry: Geometry) -> None:
    table, growing = RankTable.full(geometry), len(geometry.compressed)
    assert table.budget == table.share("key") == table.share("value") == 1
    assert table == RankTable.uniform(geometry, 1)
    assert table.bytes_per_token(torch.bfloat16) == growing * 2 * 2 * 16 * 2
    layers = [min(50, (shape.window or 51) - 1) for shape in geometry.layers]
    assert table.nbytes(50, torch.float32, batch=3) == 3 * sum(layers) * 2 * 2 * 16 * 4


@GEOMETRIES
def test_one_more_token_costs_bytes_per_token(geometry: Geometry) -> None:
    table = ragged_table(geometry, 1)
    more = table.nbytes(101, torch.float16, batch=2) - table.nbytes(100, torch.float16, batch=2)
    assert more == 2 * table.bytes_per_token(torch.float16)


def test_exact_tokens_cost_their_full_width() -> None:
    table = RankTable.uniform(PLAIN, 0.25)
    dropped = 3 * 2 * 2 * 12 * 4
    plain = table.nbytes(10, torch.float32)
    assert table.nbytes(10, torch.float32, sink=2, recent=3) == plain + 5 * dropped
    assert table.nbytes(10, torch.float32, sink=99) == RankTable.full(PLAIN).nbytes(
        10, torch.float32
    )


@GEOMETRIES
def test_what_is_held_is_a_share_of_what_a_full_cache_holds(geometry: Geometry) -> None:
    table, full = ragged_table(geometry, 3), RankTable.full(geometry)
    assert full.held(7, sink=2) == table.held(4, sink=2, recent=9) == 1
    # After 10 tokens a layer with a window of 8 holds 7 of them, at full width.
    stays = geometry.staying * 7 * 2 * 2 * 16
    grows = len(geometry.compressed) * 2 * 2 * 16
    whole, kept = stays + 10 * grows, stays + 5 * grows + 5 * table.columns
    assert table.held(10, sink=2, recent=3) == kept / whole
    assert (table.held(10) > table.budget) == (geometry.staying > 0)
    assert table.held(10**9) == pytest.approx(table.budget, rel=1e-6)


@GEOMETRIES
def test_compressed_ranks_lists_every_rank_once(geometry: Geometry) -> None:
    table = ragged_table(geometry, 2)
    listed = {(layer, side, head): rank for layer, side, head, rank in table.compressed_ranks()}
    assert len(listed) == len(list(table.compressed_ranks())) == len(geometry.compressed) * 4
    assert all(
        table.side(side)[layer][head] == rank for (layer, side, head), rank in listed.items()
    )
