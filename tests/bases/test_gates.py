"""Gates on columns, and products with them."""

from __future__ import annotations

import pytest
import torch

from matkv.bases.gates import GatedProjection, Projected, gated, rank_gate
from tiny import random_maps


def test_gates_are_open_up_to_the_rank() -> None:
    gate_GD = rank_gate(torch.tensor([0, 2, 4]), 4)
    assert gate_GD.int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert rank_gate(torch.tensor([[1], [3]]), 3).shape == (2, 1, 3)


@pytest.mark.parametrize("oblique", [False, True])
def test_a_gated_product_is_that_of_the_leading_columns(oblique: bool) -> None:
    maps = random_maps(2, 6, 0, oblique=oblique)
    product_GDD = gated(maps, rank_gate(torch.tensor([2, 5]), 6))
    for head, rank in enumerate((2, 5)):
        encode_DR, decode_DR = maps.encode_XDD[head, :, :rank], maps.decode_XDD[head, :, :rank]
        torch.testing.assert_close(product_GDD[head], encode_DR @ decode_DR.T)


def test_gates_are_open_at_first_and_take_gradients() -> None:
    maps = random_maps(2, 6, 0)
    projection = GatedProjection({"key": maps, "value": maps})
    states_BGTD = torch.randn(1, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    for truncated in projection(states_BGTD, states_BGTD):
        torch.testing.assert_close(truncated, states_BGTD)
    projection.gates["key"].requires_grad_()
    projection(states_BGTD, states_BGTD)[0].square().sum().backward()
    grad_GD = projection.gates["key"].grad
    assert grad_GD is not None and bool((grad_GD > 0).all())


def test_a_side_without_a_matrix_stays_as_it_is() -> None:
    projected = Projected()
    projected.value = torch.zeros(2, 6, 6)
    states_BGTD = torch.ones(1, 2, 3, 6)
    key, value = projected(states_BGTD, states_BGTD)
    assert key is states_BGTD and not bool(value.any())
