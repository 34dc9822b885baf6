"""Allocation on tiny models: searches, estimates, limits, resuming.

Shapes: B batch, T token, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import matkv
from matkv.allocate.config import AllocateConfig, Constraints
from matkv.allocate.descent import Descent
from matkv.allocate.divergence import Gated, Text, add_teacher, measure, measure_changes, take_text
from matkv.allocate.fisher import Sensitivity, expand
from matkv.allocate.rounds import Progress, gated_projections
from matkv.allocate.space import Space
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Distilled
from matkv.bases.gates import GatedProjection
from matkv.distill.bases import rank_axes
from matkv.errors import BudgetError, DataError, MatkvError, RankError
from matkv.hf.handlers import truncating
from matkv.ranks import Cell, RankTable, Side
from matkv.schedule import Independent
from tiny import Tiny, build, left_padded, tokens

BATCHES = [tokens(2, 24, seed=seed) for seed in range(4)]
SMALL: dict[str, Any] = {"search_tokens": 96, "held_out_tokens": 48, "expansions": 5}
FISHER = AllocateConfig(**SMALL, budgets=(0.75, 0.5, 0.25))
GREEDY = AllocateConfig(**SMALL, method="greedy", budgets=(0.95, 0.9))


def text_of(subject: Tiny, batches: list[Any] = BATCHES[:2]) -> Text:
    count = sum(
        b.numel() if isinstance(b, Tensor) else int(b["attention_mask"].sum()) for b in batches
    )
    text = take_text(batches, count, torch.device("cpu"), "test")
    add_teacher(subject.model, text)
    return text


def expanded(subject: Tiny, text: Text, table: RankTable, samples: int = 1) -> Sensitivity:
    gated = gated_projections(subject.model, subject.artifact)
    with truncating(subject.model, gated):
        return expand(subject.model, gated, text, table, samples=samples, seed=1)


@torch.no_grad()
def attached_kl(subject: Tiny, batches: list[Tensor], table: RankTable) -> float:
    """KL by the latent attention of the real thing, in fp64."""
    teacher = [subject.model(ids).logits.double().log_softmax(-1) for ids in batches]
    subject.attach(ranks=table)
    student = [subject.model(ids).logits.double().log_softmax(-1) for ids in batches]
    matkv.detach(subject.model)
    sums = [(p.exp() * (p - q)).sum() for p, q in zip(teacher, student, strict=True)]
    return float(torch.stack(sums).sum()) / sum(ids.numel() for ids in batches)


def measured(subject: Tiny, text: Text, table: RankTable) -> float:
    gated = gated_projections(subject.model, subject.artifact)
    with truncating(subject.model, gated):
        return measure(subject.model, gated, text, table).kl


# ---- measuring


def test_measured_kl_is_that_of_the_attached_model(family: Tiny) -> None:
    table = family.ragged(3)
    expected = attached_kl(family, BATCHES[:2], table)
    assert measured(family, text_of(family), table) == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3


def test_full_ranks_diverge_by_nothing(family: Tiny) -> None:
    text, full = text_of(family), RankTable.full(family.geometry)
    gated = gated_projections(family.model, family.artifact)
    with truncating(family.model, gated):
        found = measure(family.model, gated, text, full)
    assert abs(found.kl) < 1e-6 and abs(found.perplexity_increase) < 1e-5
    assert found.loss == pytest.approx(found.teacher_loss, abs=1e-5)


def test_padding_does_not_count(llama: Tiny) -> None:
    ids_BT, mask_BT = left_padded([tokens(1, 24, seed=1), tokens(1, 15, seed=2)])
    padded = text_of(llama, [{"input_ids": ids_BT, "attention_mask": mask_BT}])
    apart = text_of(llama, [tokens(1, 24, seed=1), tokens(1, 15, seed=2)])
    table = llama.ragged(1)
    assert padded.tokens == apart.tokens == 39
    assert measured(llama, padded, table) == pytest.approx(measured(llama, apart, table), rel=1e-4)


@pytest.mark.parametrize("batched", [1, 2, 5])
def test_changes_measured_from_shared_states_are_those_measured_alone(
    family: Tiny, batched: int
) -> None:
    space = Space.of(family.geometry, Constraints(step=5))
    text, path = text_of(family), Descent(space, (0, 3, 3))
    changes: dict[int, list[RankTable]] = {}
    for index, unit in enumerate(space.units):
        changes.setdefault(unit.layer, []).append(path.extended([index]).table())
    gated: Gated = gated_projections(family.model, family.artifact)
    with truncating(family.model, gated):
        kl, found = measure_changes(
            family.model, gated, text, path.table(), changes, batched=batched
        )
        assert kl == pytest.approx(measure(family.model, gated, text, path.table()).kl, rel=1e-6)
        for layer, tables in changes.items():
            alone = [measure(family.model, gated, text, table).kl for table in tables]
            assert found[layer] == pytest.approx(alone, rel=1e-4, abs=1e-7)


# ---- greedy


def test_greedy_is_the_papers_algorithm(llama: Tiny) -> None:
    """Against Algorithm 1 written down plainly, on attached models."""
    step, budgets = 8, (0.9, 0.75)
    table, expected = RankTable.full(llama.geometry), {}
    for budget in budgets:
        while table.budget > budget:
            candidates = [lowered(table, *place, step) for place in places(table)]
            table = min(candidates, key=lambda one: attached_kl(llama, BATCHES[2:], one))
        expected[budget] = table
    config = AllocateConfig(
        method="greedy", budgets=budgets, constraints=Constraints(step=step), search_tokens=96,
        held_out_tokens=96,
    )  # fmt: skip
    assert allocate(llama.model, llama.artifact, BATCHES, config).tables == expected


def places(table: RankTable) -> list[tuple[int, Any, int]]:
    return [(layer, side, head) for layer, side, head, rank in table.growing_ranks() if rank]


def lowered(table: RankTable, layer: int, side: Any, head: int, step: int) -> RankTable:
    data = table.to_json()
    data[side][layer][head] -= step
    return RankTable.from_json(table.geometry, data)


def test_candidates_batched_give_the_same_tables(gemma3: Tiny) -> None:
    tables = [
        allocate(
            gemma3.model, gemma3.artifact, BATCHES,
            AllocateConfig(**SMALL, method="greedy", budgets=(0.7,), batched=batched),
        ).tables
        for batched in (1, 3)
    ]  # fmt: skip
    assert tables[0] == tables[1]


def test_several_drops_a_round(llama: Tiny) -> None:
    rounds: list[Progress] = []
    config = AllocateConfig(**SMALL, method="greedy", budgets=(0.75,), drops=6)
    made = allocate(llama.model, llama.artifact, BATCHES, config, on_progress=rounds.append)
    assert made.tables[0.75].budget == pytest.approx(0.75)
    assert len(rounds) == 4 and rounds[-1].seconds_left == 0


# ---- fisher


def test_slope_is_the_gradient_of_the_kl(llama: Tiny) -> None:
    """Against closing a gate by a little, where ranks are truncated already."""
    text, table = text_of(llama, BATCHES[:1]), RankTable.uniform(llama.geometry, 0.5)
    slope = expanded(llama, text, table).slope
    columns: list[tuple[Cell, int]] = [
        ((0, "key", 1), 2),
        ((1, "value", 0), 5),
        ((2, "key", 0), 9),
    ]
    for (layer, side, head), column in columns:
        kl = [nudged_kl(llama, text, table, layer, side, head, column, by) for by in (-0.02, 0.02)]
        found = float(slope[layer, side][head, column])
        assert found == pytest.approx((kl[1] - kl[0]) / 0.04, rel=0.03, abs=1e-6)


def test_half_the_squared_score_is_the_kl_of_a_small_change(llama: Tiny) -> None:
    """Around full rank the KL is quadratic; with many samples the estimate meets it."""
    text, full = text_of(llama, BATCHES[:1]), RankTable.full(llama.geometry)
    score = expanded(llama, text, full, samples=200).score
    cells: list[Cell] = [(0, "value", 1), (1, "key", 0), (2, "value", 0)]
    for layer, side, head in cells:
        kl = nudged_kl(llama, text, full, layer, side, head, slice(8, 16), -0.05)
        estimate = 0.5 * float(score[layer, side][:, head, 8:].sum(-1).square().sum())
        assert estimate * 0.05**2 == pytest.approx(kl, rel=0.25)


def nudged_kl(
    subject: Tiny,
    text: Text,
    table: RankTable,
    layer: int,
    side: Side,
    head: int,
    columns: Any,
    by: float,
) -> float:
    gated = gated_projections(subject.model, subject.artifact)

    class Nudged(GatedProjection):
        def matrices(self) -> tuple[Tensor, Tensor]:
            self.gates[side] = self.gates[side].clone()
            self.gates[side][head, columns] += by
            return super().matrices()

    gated[layer].__class__ = Nudged
    assert len(text.pieces) == 1  # the gates are nudged in every forward pass
    with truncating(subject.model, gated):
        return measure(subject.model, gated, text, table).kl


def test_estimates_rank_small_drops_as_true_kl_does(llama: Tiny) -> None:
    space = Space.of(llama.geometry, Constraints(step=2))
    text = text_of(llama)
    sensitivity = expanded(llama, text, RankTable.full(llama.geometry), samples=8)
    estimates = [costs[1] for costs in sensitivity.costs(space, space.top)]
    true = [measured(llama, text, Descent(space, (i,)).table()) for i in range(len(space.units))]
    ranks = torch.tensor([estimates, true]).argsort().argsort().float()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.8


def test_costs_of_a_group_add_gradients_before_squaring(llama: Tiny) -> None:
    table = RankTable.full(llama.geometry)
    sensitivity = expanded(llama, text_of(llama), table)
    space = Space.of(llama.geometry, Constraints(step=4, equal_heads=True))
    score_ND = sensitivity.score[0, "key"].sum(1)
    slope_D = sensitivity.slope[0, "key"].sum(0)
    for level, cost in enumerate(sensitivity.costs(space, space.top)[0]):
        dropped = slice(16 - 4 * level, 16)
        expected = 0.5 * score_ND[:, dropped].sum(-1).square().sum() - slope_D[dropped].sum()
        assert cost == pytest.approx(float(expected), rel=1e-4, abs=1e-7)


def test_expanding_leaves_the_model_as_it_was(llama: Tiny) -> None:
    before = [parameter.requires_grad for parameter in llama.model.parameters()]
    implementation = llama.model.config._attn_implementation
    expanded(llama, text_of(llama), RankTable.full(llama.geometry))
    assert [parameter.requires_grad for parameter in llama.model.parameters()] == before
    assert all(parameter.grad is None for parameter in llama.model.parameters())
    assert llama.model.config._attn_implementation == implementation


def test_fisher_beats_uniform_ranks(llama: Tiny) -> None:
    made = allocate(llama.model, llama.artifact, BATCHES, FISHER)
    for entry in made.history[-1]["tables"]:
        assert entry["kl"] < entry["uniform_kl"]


# ---- tables


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
        pairs = zip(table.growing_ranks(), smaller.growing_ranks(), strict=True)
        assert all(2 <= below[3] <= above[3] for above, below in pairs)


def test_one_run_gives_the_whole_curve_and_survives_saving(llama: Tiny, tmp_path: Path) -> None:
    made = allocate(llama.model, llama.artifact, BATCHES, AllocateConfig(**SMALL))
    assert sorted(made.tables) == [eighth / 8 for eighth in range(1, 8)]
    assert Artifact.load(made.save(tmp_path / "run")).tables == made.tables
    entry = made.history[-1]
    assert entry["stage"] == "allocate" and entry["method"] == "fisher"
    assert json.loads(json.dumps(entry)) == entry | {"budgets": None} or entry["tables"]


def test_default_budgets_are_those_the_constraints_allow(llama: Tiny) -> None:
    config = AllocateConfig(
        method="uniform", held_out_tokens=48, constraints=Constraints(min_rank=7)
    )
    made = allocate(llama.model, llama.artifact, BATCHES, config)
    assert sorted(made.tables) == [0.5, 0.625, 0.75, 0.875]
    assert made.tables[0.5] == RankTable.uniform(llama.geometry, 0.5)


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
    config = AllocateConfig(
        held_out_tokens=48, method="uniform", budgets=(0.25,), max_perplexity_increase=0.001
    )
    made = allocate(llama.model, llama.artifact, BATCHES, config)
    (budget,) = set(made.tables) - {0.25} or {0.25}
    entry = next(one for one in made.history[-1]["tables"] if one["budget"] == budget)
    assert entry["perplexity_increase"] <= 0.001


def test_an_error_limit_that_nothing_holds_is_an_error(llama: Tiny) -> None:
    config = AllocateConfig(
        **SMALL, max_kl=1e-9, constraints=Constraints(max_rank=8), budgets=(0.3,)
    )
    with pytest.raises(BudgetError, match="max_kl"):
        allocate(llama.model, llama.artifact, BATCHES, config)


# ---- interrupts and resuming


@pytest.mark.parametrize("config", [FISHER, GREEDY], ids=["fisher", "greedy"])
def test_a_search_goes_on_where_it_was_cut_off(
    llama: Tiny, tmp_path: Path, config: AllocateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    whole: list[Progress] = []
    expected = allocate(llama.model, llama.artifact, BATCHES, config, on_progress=whole.append)
    state = tmp_path / "state.jsonl"

    def interrupt(progress: Progress) -> None:
        if progress.rounds == 2:
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING):
        cut = allocate(
            llama.model, llama.artifact, BATCHES, config, state=state, on_progress=interrupt
        )
    assert "interrupted" in caplog.text and cut.history[-1]["interrupted"]
    assert min(cut.tables) > min(expected.tables)
    shared = set(cut.tables) & set(expected.tables)
    assert all(cut.tables[budget] == expected.tables[budget] for budget in shared)
    last = cut.tables[min(cut.tables)]
    assert last.budget == pytest.approx(min(cut.tables), abs=1e-4)
    with state.open("a") as file:
        file.write('{"drops": [1, ')  # a kill in the middle of a line
    rest: list[Progress] = []
    resumed = allocate(
        llama.model, llama.artifact, BATCHES, config, state=state, on_progress=rest.append
    )
    assert resumed.tables == expected.tables
    assert [one.rounds for one in rest] == [one.rounds for one in whole][2:]


def test_the_state_of_another_search_is_refused(llama: Tiny, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    allocate(llama.model, llama.artifact, BATCHES, FISHER, state=state)
    other = AllocateConfig(**SMALL, budgets=(0.75, 0.5, 0.25), seed=1)
    with pytest.raises(MatkvError, match="other settings"):
        allocate(llama.model, llama.artifact, BATCHES, other, state=state)
    with pytest.raises(MatkvError, match="other settings"):
        allocate(llama.model, llama.artifact, BATCHES[::-1], FISHER, state=state)


# ---- errors


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "best"}, "method 'best'"),
        ({"budgets": ()}, "no budget"),
        ({"budgets": (0.5, 1.5)}, r"budget 1\.5"),
        ({"search_tokens": 0}, "search_tokens 0"),
        ({"drops": 0}, "drops 0"),
        ({"max_kl": -1.0}, "max_kl -1"),
        ({"max_perplexity_increase": float("nan")}, "max_perplexity_increase nan"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(MatkvError, match=named):
        AllocateConfig(**options)


def test_too_little_text_and_impossible_budgets_are_named(llama: Tiny) -> None:
    with pytest.raises(DataError, match="ends after 192 of 4096 tokens to verify"):
        allocate(llama.model, llama.artifact, BATCHES)
    config = AllocateConfig(budgets=(0.1,), constraints=Constraints(min_rank=4))
    with pytest.raises(BudgetError, match=r"below 0\.25"):
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
        ranks = [rank for *_, rank in found.tables[0.5].growing_ranks()]
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
