"""Expansions of the KL, against gates that are closed by a little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from matkv.allocate.config import Constraints
from matkv.allocate.descent import Descent
from matkv.allocate.divergence import Text, measure
from matkv.allocate.rounds import gated_projections
from matkv.allocate.space import Space
from matkv.bases.gates import GatedProjection
from matkv.hf.handlers import truncating
from matkv.ranks import Cell, RankTable, Side
from searches import BATCHES, expanded, measured, text_of
from tiny import Tiny


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
