"""Bases from moments: orthogonal, ordered, and the best there are for what they minimize."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matkv.bases.maps import Maps
from matkv.bases.moments import (
    KEY_BASES,
    VALUE_BASES,
    LayerMoments,
    column_energy,
    key_maps,
    ordered_basis,
    unit_trace,
    value_maps,
)
from tiny import largest_difference

HEADS, DIM = 3, 8


def random_moment(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_GND = torch.randn(HEADS, 50, DIM, generator=generator) * torch.linspace(3, 0.1, DIM)
    mix_GDD = torch.randn(HEADS, DIM, DIM, generator=generator)
    x_GND = x_GND @ mix_GDD
    return x_GND.mT @ x_GND / 50


MOMENTS = LayerMoments(*(random_moment(seed) for seed in range(4)))
ALL_MAPS = [
    pytest.param(key_maps(MOMENTS, kind), id=f"key-{kind}")  # type: ignore[arg-type]
    for kind in KEY_BASES
] + [
    pytest.param(value_maps(MOMENTS, kind), id=f"value-{kind}")  # type: ignore[arg-type]
    for kind in VALUE_BASES
]


@pytest.mark.parametrize("maps", ALL_MAPS)
def test_maps_are_each_others_inverse_in_fp32(maps: Maps) -> None:
    assert maps.encode_XDD.dtype == maps.decode_XDD.dtype == torch.float32
    assert largest_difference(maps.encode_XDD @ maps.decode_XDD.mT, torch.eye(DIM)) < 1e-5


@pytest.mark.parametrize(
    ("maps", "moment"),
    [
        (key_maps(MOMENTS, "pca"), MOMENTS.key),
        (value_maps(MOMENTS, "pca"), MOMENTS.value),
        (key_maps(MOMENTS, "query"), unit_trace(MOMENTS.key) + unit_trace(MOMENTS.query)),
        (value_maps(MOMENTS, "output"), unit_trace(MOMENTS.value) + unit_trace(MOMENTS.output)),
    ],
    ids=["key-pca", "value-pca", "key-query", "value-output"],
)
def test_a_basis_diagonalizes_its_moment_largest_first(maps: Maps, moment: Tensor) -> None:
    rotated_GDD = maps.encode_XDD.mT @ moment @ maps.encode_XDD
    energy_GD = rotated_GDD.diagonal(dim1=-2, dim2=-1)
    scale = float(energy_GD.max())
    assert largest_difference(rotated_GDD, torch.diag_embed(energy_GD)) < 1e-5 * scale
    assert bool((energy_GD.diff(dim=-1) <= 0).all())


def test_no_other_basis_keeps_more_energy_at_any_rank() -> None:
    basis_GDD = ordered_basis(MOMENTS.key)
    generator = torch.Generator().manual_seed(9)
    for _ in range(20):
        other_GDD = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator)).Q
        kept, others = (
            column_energy(MOMENTS.key, Maps.orthogonal(u)).cumsum(-1)
            for u in (basis_GDD, other_GDD)
        )
        assert bool((kept >= others - 1e-6).all())


def test_energy_is_a_share() -> None:
    for maps in (key_maps(MOMENTS, "pca"), key_maps(MOMENTS, "query")):
        energy_GD = column_energy(MOMENTS.key, maps)
        assert energy_GD.shape == (HEADS, DIM)
        assert bool((energy_GD >= 0).all())
        torch.testing.assert_close(energy_GD.sum(-1), torch.ones(HEADS))


def test_bases_do_not_depend_on_the_units_of_keys_and_queries() -> None:
    scaled = LayerMoments(MOMENTS.key * 100, MOMENTS.query / 7, MOMENTS.value, MOMENTS.output)
    once, again = key_maps(MOMENTS, "query").encode_XDD, key_maps(scaled, "query").encode_XDD
    overlap_GDD = (once.mT @ again).abs()
    assert largest_difference(overlap_GDD, torch.eye(DIM)) < 1e-4


def test_a_silent_head_gets_a_basis_all_the_same() -> None:
    zero = torch.zeros(1, DIM, DIM)
    silent = LayerMoments(zero, zero, zero, zero)
    for maps in (key_maps(silent, "query"), value_maps(silent, "output")):
        assert largest_difference(maps.encode_XDD @ maps.encode_XDD.mT, torch.eye(DIM)) < 1e-6
        assert bool(column_energy(zero, maps).isfinite().all())
