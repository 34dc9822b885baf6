"""Limits of error, on text that no search has read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from matkv.allocate.config import AllocateConfig, Constraints
from matkv.allocate.stage import allocate
from matkv.errors import BudgetError
from searches import BATCHES, FISHER, SMALL
from tiny import Tiny, greedy, tokens


def test_an_error_limit_picks_the_smallest_cache_that_holds_it(llama: Tiny) -> None:
    free = allocate(llama.model, llama.artifact, BATCHES, FISHER)
    errors = {entry["budget"]: entry["kl"] for entry in free.history[-1]["tables"]}
    limit = (errors[0.75] + errors[0.5]) / 2
    config = AllocateConfig(**SMALL, budgets=(0.75, 0.5, 0.25), max_kl=limit)
    made = allocate(llama.model, llama.artifact, BATCHES, config)
    (budget,) = set(made.tables) - set(free.tables)
    assert budget - 1e-4 < made.tables[budget].budget <= budget
    assert 0.5 < budget < 0.75
    entry = next(one for one in made.history[-1]["tables"] if one["budget"] == budget)
    assert entry["kl"] <= limit


def test_perplexity_may_be_limited(llama: Tiny) -> None:
    """On text that the model itself would write, so that truncation makes it less likely."""
    text = greedy(llama.model, tokens(4, 4), new=20)
    config = AllocateConfig(
        held_out_tokens=96, method="uniform", budgets=(0.125,), max_perplexity_increase=0.2
    )
    made = allocate(llama.model, llama.artifact, [text], config)
    (budget,) = set(made.tables) - {0.125}
    increases = {one["budget"]: one["perplexity_increase"] for one in made.history[-1]["tables"]}
    assert increases[budget] <= 0.2 < increases[0.125]
    smaller = replace(config, budgets=(budget - 0.125,), max_perplexity_increase=None)
    (below,) = allocate(llama.model, llama.artifact, [text], smaller).history[-1]["tables"]
    assert below["perplexity_increase"] > 0.2


def test_a_table_without_a_column_has_a_budget_to_ask_for(llama: Tiny) -> None:
    config = AllocateConfig(
        held_out_tokens=48, method="uniform", budgets=(0.5,), max_perplexity_increase=1e3
    )
    made = allocate(llama.model, llama.artifact, BATCHES, config)
    budget = min(made.tables)
    assert budget == 0.0001 and made.table(budget).budget == 0


def test_an_error_limit_that_nothing_holds_is_an_error(llama: Tiny) -> None:
    config = AllocateConfig(
        **SMALL, max_kl=1e-9, constraints=Constraints(max_rank=8), budgets=(0.3,)
    )
    with pytest.raises(BudgetError, match="max_kl"):
        allocate(llama.model, llama.artifact, BATCHES, config)
