"""Pairs of maps."""

from __future__ import annotations

import torch

from matkv.bases.maps import Maps
from tiny import random_maps


def test_orthogonal_maps_are_one_tensor_and_stay_so() -> None:
    maps = random_maps(2, 4, 0)
    assert maps.is_orthogonal
    doubled = maps.changed(torch.Tensor.double)
    assert doubled.is_orthogonal and doubled.encode_XDD.dtype == torch.float64


def test_both_maps_change_alike() -> None:
    maps = random_maps(3, 4, 0, oblique=True)
    picked = maps.changed(lambda x_XDD: x_XDD[1:])
    assert not picked.is_orthogonal
    assert torch.equal(picked.encode_XDD, maps.encode_XDD[1:])
    assert torch.equal(picked.decode_XDD, maps.decode_XDD[1:])


def test_equal_maps_of_two_tensors_are_not_taken_for_orthogonal() -> None:
    basis_XDD = random_maps(1, 4, 0).encode_XDD
    assert not Maps(basis_XDD, basis_XDD.clone()).is_orthogonal
