"""Learned maps start exactly at the given ones, and the orthogonal ones stay orthogonal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matkv.bases.learned import PARAMETRIZATIONS, LearnedMaps, Parametrization, nearest_orthogonal
from matkv.bases.maps import Maps
from matkv.errors import TrainingError

ORTHOGONAL = [kind for kind in PARAMETRIZATIONS if kind != "free"]


def some_basis(matrices: int = 6, dim: int = 16) -> Tensor:
    source = torch.Generator().manual_seed(0)
    basis_XDD, _ = torch.linalg.qr(torch.randn(matrices, dim, dim, generator=source))
    made_XDD: Tensor = basis_XDD.contiguous()
    return made_XDD


def off_orthogonal(basis_XDD: Tensor) -> float:
    eye_DD = torch.eye(basis_XDD.shape[-1])
    return float(torch.linalg.matrix_norm(basis_XDD.mT @ basis_XDD - eye_DD).max())


def train(
    learned: LearnedMaps, target_XDD: Tensor, steps: int = 30, lr: float = 0.05
) -> list[float]:
    """Bring the leading half of the columns to those of a target."""
    optimizer = torch.optim.Adam(learned.parameters(), lr=lr)
    half = target_XDD.shape[-1] // 2
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (learned().encode_XDD - target_XDD)[..., :half].square().sum()
        loss = loss + (learned().decode_XDD - target_XDD)[..., :half].square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_training_starts_exactly_at_the_given_maps(kind: Parametrization) -> None:
    basis_XDD = some_basis()
    maps = LearnedMaps(Maps.orthogonal(basis_XDD), kind)()
    assert torch.equal(maps.encode_XDD, basis_XDD)
    assert torch.equal(maps.decode_XDD, basis_XDD)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_it_learns_from_the_start(kind: Parametrization) -> None:
    basis_XDD = some_basis()
    noise_DD = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    turn_DD, _ = torch.linalg.qr(torch.eye(16) + 0.2 * noise_DD)
    losses = train(LearnedMaps(Maps.orthogonal(basis_XDD), kind), basis_XDD @ turn_DD)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_bases_stay_orthogonal(kind: Parametrization) -> None:
    learned = LearnedMaps(Maps.orthogonal(some_basis()), kind)
    train(learned, some_basis().flip(-1), steps=100)
    before = learned().encode_XDD.detach()
    assert off_orthogonal(before) < 1e-4
    maps = learned.export()
    assert maps.is_orthogonal
    assert off_orthogonal(maps.encode_XDD) < 2e-6
    torch.testing.assert_close(maps.encode_XDD, before, atol=1e-4, rtol=0)


def test_large_turns_stay_orthogonal_at_large_sizes() -> None:
    learned = LearnedMaps(Maps.orthogonal(some_basis(4, 128)), "cayley")
    with torch.no_grad():
        learned.lower_XP.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
    assert off_orthogonal(learned.export().encode_XDD) < 1e-5


def test_free_maps_learn_two_different_ones() -> None:
    learned = LearnedMaps(Maps.orthogonal(some_basis()), "free")
    with torch.no_grad():
        learned.encode_XDD.add_(1)
    maps = learned.export()
    assert not maps.is_orthogonal
    torch.testing.assert_close(maps.encode_XDD, some_basis() + 1)
    torch.testing.assert_close(maps.decode_XDD, some_basis())


@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_autocast_does_not_cost_precision(kind: Parametrization) -> None:
    learned = LearnedMaps(Maps.orthogonal(some_basis()), kind)
    with torch.no_grad():
        learned.lower_XP.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    plain = learned().encode_XDD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(learned().encode_XDD, plain)


def test_an_orthogonal_kind_refuses_free_maps() -> None:
    with pytest.raises(TrainingError, match="needs an orthogonal start"):
        LearnedMaps(Maps(some_basis(), some_basis() + 1), "cayley")


def test_what_is_far_from_orthogonal_is_not_passed_off_as_a_basis() -> None:
    with pytest.raises(TrainingError, match="lost its orthogonality"):
        nearest_orthogonal(2 * some_basis().double())
