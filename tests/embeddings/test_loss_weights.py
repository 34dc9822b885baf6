"""What every size counts in the loss over a ladder: the full size's weight, and balanced gradients.

Shapes: B text, D dimension.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn

from matkv.embeddings import LadderLoss, ladder
from matkv.errors import TrainingError
from tiny_embedders import HIDDEN, LAYERS, TEXTS, build, features

FULL = (LAYERS, HIDDEN)
RUNGS = ((1, 8), (2, 16), FULL)
PAIRS = (TEXTS[:3], TEXTS[1:4])


def _parts(model: SentenceTransformer, **options: Any) -> dict[str, Tensor]:
    base = losses.MultipleNegativesRankingLoss(model)
    loss = LadderLoss(model, base, ladder(model, RUNGS), **options)
    parts: dict[str, Tensor] = loss(features(model, *PAIRS), None)
    return parts


def _gradient(model: SentenceTransformer, total: Tensor) -> list[Tensor]:
    model.zero_grad()
    total.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _sum(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def test_the_full_size_counts_as_often_as_its_weight_says() -> None:
    model = build("bert")
    equal, weighted = _parts(model), _parts(model, full_weight=4.0)
    shares = [weighted[size].item() / (3 * equal[size].item()) for size in equal]
    assert shares == pytest.approx([1 / 6, 1 / 6, 4 / 6])
    with pytest.raises(TrainingError, match="full_weight 0 must be above 0"):
        _parts(model, full_weight=0)


@pytest.mark.parametrize("full_weight", [1.0, 4.0])
def test_balanced_gradients_are_those_of_the_logarithms(full_weight: float) -> None:
    model = build("bert")
    parts = _parts(model, full_weight=full_weight)
    shares = [full_weight if size == "4x32" else 1.0 for size in parts]
    values = [part / share for part, share in zip(parts.values(), shares, strict=True)]
    logs = [share * value.log() for share, value in zip(shares, values, strict=True)]
    scale = _sum(parts).detach() / sum(shares)
    wanted = _gradient(model, torch.stack(logs).sum() * scale)
    balanced = _parts(model, full_weight=full_weight, balanced=True)
    found = _gradient(model, _sum(balanced))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_logged_of_a_balanced_loss_is_the_loss() -> None:
    model = build("bert")
    plain, balanced = _parts(model), _parts(model, balanced=True)
    assert {size: part.item() for size, part in plain.items()} == {
        size: part.item() for size, part in balanced.items()
    }


def test_a_balanced_ladder_of_one_size_is_the_base_loss_bit_for_bit() -> None:
    model = build("bert")
    base = losses.MultipleNegativesRankingLoss(model)
    loss = LadderLoss(model, base, ladder(model, [FULL]), balanced=True)
    found = _gradient(model, _sum(loss(features(model, *PAIRS), None)))
    wanted = _gradient(model, base(features(model, *PAIRS), None))
    assert all(map(torch.equal, found, wanted))


class Nothing(nn.Module):
    """A base loss with nothing left to lose."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        return torch.stack([u_BD.square().sum() * 0 for u_BD in embeddings]).sum()


def test_losses_of_zero_can_be_balanced() -> None:
    model = build("bert")
    loss = LadderLoss(model, Nothing(), ladder(model, RUNGS), balanced=True)
    found = _gradient(model, _sum(loss(features(model, *PAIRS), None)))
    assert not any(gradient.any() for gradient in found)
