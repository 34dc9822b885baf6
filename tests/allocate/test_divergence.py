"""Divergence measured through gates is that of the attached model."""

from __future__ import annotations

import pytest

from matkv.allocate.config import Constraints
from matkv.allocate.descent import Descent
from matkv.allocate.divergence import Gated, measure, measure_changes
from matkv.allocate.rounds import gated_projections
from matkv.allocate.space import Space
from matkv.hf.handlers import truncating
from matkv.ranks import RankTable
from searches import BATCHES, attached_kl, measured, text_of
from tiny import Tiny, left_padded, tokens


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
