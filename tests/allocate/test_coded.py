"""Searches for ranks and bits, from measured damage to verified tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import matkv
from matkv.allocate import AllocateConfig, allocate
from matkv.allocate.divergence import set_gates
from matkv.allocate.noise import measure_noise
from matkv.allocate.rounds import gated_projections
from matkv.errors import BudgetError
from matkv.hf.handlers import truncating
from matkv.ranks import SIDES
from searches import BATCHES, measured, text_of
from tiny import Tiny, left_padded, tokens

SIZES: dict[str, Any] = {"search_tokens": 96, "held_out_tokens": 48}


@pytest.mark.parametrize("recent", [0, 12])
def test_damage_foretells_the_divergence_of_noise(llama: Tiny, recent: int) -> None:
    """At 4 bits everywhere, where errors are small: half the Fisher information times the error."""
    text = text_of(llama)
    exact = replace(llama.artifact, recent=recent)
    artifact, damage = measure_noise(llama.model, exact, [text] * 30, seed=1)
    subject = replace(llama, artifact=artifact)
    bands = dict.fromkeys(damage, (0, 0, llama.geometry.layers[0].head_dim, 0))
    table = matkv.RankTable.banded(llama.geometry, bands)
    foretold = float(torch.stack([one[:, 2].sum() for one in damage.values()]).sum())
    assert measured(subject, text, table) == pytest.approx(foretold, rel=0.5)


def test_what_no_query_sees_of_a_code_costs_nothing(llama: Tiny) -> None:
    """Near queries see the exact token, however much they look at it."""
    text = text_of(llama)
    longest = max(piece.batch.ids_BT.shape[1] for piece in text.pieces)
    for recent, costs in ((longest - 1, False), (longest - 2, True)):
        artifact = replace(llama.artifact, recent=recent)
        _, damage = measure_noise(llama.model, artifact, [text], seed=1)
        assert all(bool(one.any()) == costs for one in damage.values())


def test_damage_at_a_table_is_that_of_the_model_at_it(llama: Tiny) -> None:
    """What columns are worth where others are dropped, not at the full cache."""
    text = text_of(llama)
    artifact, at_full = measure_noise(llama.model, llama.artifact, [text], seed=1)
    dims = {cell: len(one) for cell, one in at_full.items()}
    full = matkv.RankTable.banded(llama.geometry, {c: (dim, 0, 0, 0) for c, dim in dims.items()})
    small = matkv.RankTable.banded(llama.geometry, {c: (0, 0, 0, 4) for c in dims})
    _, same = measure_noise(llama.model, artifact, [text], seed=1, at=full)
    _, other = measure_noise(llama.model, artifact, [text], seed=1, at=small)
    for cell, one in at_full.items():
        torch.testing.assert_close(same[cell], one, rtol=1e-3, atol=1e-9)
    assert any(not torch.allclose(other[cell], one, rtol=0.1) for cell, one in at_full.items())


def test_padding_counts_for_nothing(llama: Tiny) -> None:
    ids, mask = left_padded([tokens(1, 24, seed=1), tokens(1, 15, seed=2)])
    batch = {"input_ids": ids, "attention_mask": mask}
    alone = [tokens(1, 24, seed=1), tokens(1, 15, seed=2)]
    subject = replace(llama.artifact, sink=2)
    padded, _ = measure_noise(llama.model, subject, [text_of(llama, [batch])], seed=1)
    plain, _ = measure_noise(llama.model, subject, [text_of(llama, alone)], seed=1)
    for layer in llama.geometry.compressed:
        for side in SIDES:
            one, other = padded.quantizer(layer, side), plain.quantizer(layer, side)
            torch.testing.assert_close(one.scale_GD, other.scale_GD, rtol=1e-4, atol=1e-6)


def test_tables_by_budget_beat_ranks_and_are_verified(llama: Tiny) -> None:
    budgets = (0.5, 0.25, 0.15)
    made = allocate(llama.model, llama.artifact, BATCHES, AllocateConfig(**SIZES, budgets=budgets))
    checks = {one["budget"]: one for one in made.history[-1]["tables"]}
    assert set(made.tables) == set(checks) == set(budgets)
    ranks = AllocateConfig(**SIZES, budgets=(0.5, 0.25), codes=(16,), expansions=3)
    alone = allocate(llama.model, llama.artifact, BATCHES, ranks)
    for entry in alone.history[-1]["tables"]:
        assert checks[entry["budget"]]["kl"] < entry["kl"] / 4
    for budget, table in made.tables.items():
        assert table.coded and table.budget <= budget
    assert checks[0.15]["kl"] > checks[0.5]["kl"] > 0


def test_a_limit_of_error_gives_the_smallest_table_that_holds_it(llama: Tiny) -> None:
    config = AllocateConfig(**SIZES, budgets=(0.5,), max_kl=0.01)
    made = allocate(llama.model, llama.artifact, BATCHES, config)
    checks = {one["budget"]: one["kl"] for one in made.history[-1]["tables"]}
    smallest = min(made.tables)
    assert smallest < 0.5 and checks[smallest] <= 0.01
    with pytest.raises(BudgetError, match="max_kl"):
        allocate(llama.model, llama.artifact, BATCHES, replace(config, max_kl=1e-12, codes=(2,)))


def test_what_was_measured_is_what_the_cache_gives(llama: Tiny) -> None:
    """The simulation of search and training against the cache's own codes."""
    made = allocate(llama.model, llama.artifact, BATCHES, AllocateConfig(**SIZES, budgets=(0.25,)))
    subject, ids = replace(llama, artifact=made), tokens(2, 40)
    table = made.tables[0.25]
    for sink, recent in ((0, 0), (2, 0), (0, 3), (2, 3)):
        gated = gated_projections(llama.model, replace(made, sink=sink, recent=recent))
        set_gates(gated, table)
        with torch.no_grad(), truncating(llama.model, gated):
            simulated = llama.model(ids, use_cache=False).logits
        model = subject.attach(ranks=table, sink=sink, recent=recent)
        with torch.no_grad():
            real = model(ids, use_cache=False).logits
        matkv.detach(model)
        torch.testing.assert_close(simulated, real, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["greedy", "uniform"])
def test_other_methods_know_ranks_alone(method: Any) -> None:
    assert not AllocateConfig(method=method).has_codes
    with pytest.raises(BudgetError, match="ranks alone"):
        AllocateConfig(method=method, codes=(8, 4))
    assert AllocateConfig(codes=(16,)).has_codes is False
