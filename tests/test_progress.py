"""Randomness of one's own leaves that of others alone."""

from __future__ import annotations

import random

import numpy
import pytest
import torch

from matkv.progress import own_randomness


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(numpy.random.rand())


def test_global_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    expected = drawn()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy.random.set_state(states[2])
    with pytest.raises(RuntimeError, match="stop"), own_randomness(3):
        drawn()
        raise RuntimeError("stop")
    assert drawn() == expected


def test_the_same_seed_draws_the_same() -> None:
    numbers = []
    for seed in (3, 3, 4):
        with own_randomness(seed):
            numbers.append(float(torch.rand(())))
    assert numbers[0] == numbers[1] != numbers[2]
