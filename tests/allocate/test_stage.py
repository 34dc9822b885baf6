"""Allocation on tiny models: the tables of a whole run, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matkv.allocate.config import AllocateConfig, Constraints
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Distilled
from matkv.distill.bases import rank_axes
from matkv.errors import BudgetError, DataError, MatkvError, RankError
from matkv.ranks import RankTable
from matkv.schedule import Independent
from searches import BATCHES, FISHER, SMALL
from tiny import Tiny, build


def test_fisher_beats_uniform_ranks(llama: Tiny) -> None:
    made = allocate(llama.model, llama.artifact, BATCHES, FISHER)
    for entry in made.history[-1]["tables"]:
        assert entry["kl"] < entry["uniform_kl"]


@pytest.mark.parametrize("method", ["fisher", "greedy", "uniform"])
@pytest.mark.parametrize("step", [1, 5])
def test_tables_hold_their_budgets_and_are_nested(gemma3: Tiny, method: Any, step: int) -> None:
    budgets = (0.93, 0.9, 0.8)
    constraints = Constraints(step=step, min_rank=2)
    config = AllocateConfig(
        **SMALL, method=method, budgets=budgets, constraints=constraints, drops=4
    )
    made = allocate(gemma3.model, gemma3.artifact, BATCHES, config)
    assert sorted(made.tables, reverse=True) == list(budgets)
    tables = [made.tables[budget] for budget in budgets]
    for budget, table, smaller in zip(budgets, tables, [*tables[1:], tables[-1]], strict=True):
        assert table.budget <= budget
        pairs = zip(table.compressed_ranks(), smaller.compressed_ranks(), strict=True)
        assert all(2 <= below[3] <= above[3] for above, below in pairs)


def test_one_run_gives_the_whole_curve_and_survives_saving(llama: Tiny, tmp_path: Path) -> None:
    made = allocate(llama.model, llama.artifact, BATCHES, AllocateConfig(**SMALL))
    assert sorted(made.tables) == [eighth / 8 for eighth in range(1, 8)]
    loaded = Artifact.load(made.save(tmp_path / "run"))
    assert loaded.tables == made.tables
    entry = made.history[-1]
    assert loaded.history[-1] == json.loads(json.dumps(entry))
    assert (entry["stage"], entry["method"], entry["budgets"]) == ("allocate", "fisher", None)
    assert [check["budget"] for check in entry["tables"]] == sorted(made.tables)
    errors = [check["kl"] for check in entry["tables"]]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    for check in entry["tables"]:
        table = made.tables[check["budget"]]
        shares = table.share("key"), table.share("value")
        assert (check["key_share"], check["value_share"]) == shares


def test_default_budgets_are_those_the_constraints_allow(llama: Tiny) -> None:
    config = AllocateConfig(
        method="uniform", held_out_tokens=48, constraints=Constraints(min_rank=7)
    )
    made = allocate(llama.model, llama.artifact, BATCHES, config)
    assert sorted(made.tables) == [0.5, 0.625, 0.75, 0.875]
    assert made.tables[0.5] == RankTable.uniform(llama.geometry, 0.5)


def test_too_little_text_and_impossible_budgets_are_named(llama: Tiny) -> None:
    with pytest.raises(DataError, match="ends after 192 of 4096 tokens to verify"):
        allocate(llama.model, llama.artifact, BATCHES)
    config = AllocateConfig(budgets=(0.01,), constraints=Constraints(min_rank=4))
    with pytest.raises(BudgetError, match=r"below 0\.0625"):
        allocate(llama.model, llama.artifact, BATCHES, config)
    with pytest.raises(RankError, match="protected layer 7"):
        allocate(
            llama.model,
            llama.artifact,
            BATCHES,
            AllocateConfig(constraints=Constraints(protected=(7,))),
        )


def test_bases_of_another_model_are_refused(llama: Tiny) -> None:
    with pytest.raises(MatkvError, match="weights differ"):
        allocate(build("llama", seed=5), llama.artifact, BATCHES, FISHER)


def test_no_head_gets_a_rank_that_training_never_drew(llama: Tiny) -> None:
    axes = rank_axes(llama.geometry, 4)
    trained = llama.artifact.with_history(Distilled(schedule=Independent(axes)))
    config = AllocateConfig(**SMALL, budgets=(0.5,), constraints=Constraints(step=4))
    for artifact, lowest in ((llama.artifact, 0), (trained, 4)):
        found = allocate(llama.model, artifact, BATCHES, config)
        ranks = [rank for *_, rank in found.tables[0.5].compressed_ranks()]
        assert min(ranks) == lowest
        assert found.history[-1]["constraints"]["min_rank"] == lowest


def test_tables_are_blended_by_the_loss_that_trained_the_bases(llama: Tiny) -> None:
    trained = llama.artifact.with_history(Distilled(settings={"kl": 0.5, "ce": 1.5}))
    assert llama.artifact.loss_weights == (1.0, 0.0)
    assert trained.loss_weights == (0.25, 0.75)
    made = allocate(llama.model, trained, BATCHES, FISHER)
    assert [one["budget"] for one in made.history[-1]["shares"]] == [0.25, 0.5, 0.75]
    alone = allocate(llama.model, trained, BATCHES, replace(FISHER, blend=False))
    assert alone.history[-1]["shares"] == []
