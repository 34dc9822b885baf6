"""Schedules: deterministic, on the grid, and free of models."""

from __future__ import annotations

import json

import pytest
import torch

from matkv.errors import TrainingError
from matkv.schedule import (
    Axis,
    Cycle,
    Independent,
    Ladder,
    Sandwich,
    Schedule,
    schedule_from_json,
    uniform_rungs,
)

RANKS = tuple(Axis(f"{layer}.key.0", 64, 8) for layer in range(5))
# An embedding model: how many layers to run, and how many dimensions to keep.
EMBEDDING = (Axis("layer", 12, 1), Axis("dim", 768, 64))


def every_schedule(axes: tuple[Axis, ...]) -> list[Schedule]:
    rungs = uniform_rungs(axes, (0.75, 0.25, 0.5))
    return [Independent(axes), Ladder(axes, rungs), Cycle(axes, rungs), Sandwich(axes, random=2)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("axes", [RANKS, EMBEDDING], ids=["ranks", "embedding"])
def test_a_draw_repeats_and_stays_on_the_grid(axes: tuple[Axis, ...]) -> None:
    for schedule in every_schedule(axes):
        for step in range(5):
            drawn = schedule.draw(step, generator(step))
            assert drawn == schedule.draw(step, generator(step))
            for sizes in drawn:
                for axis, size in zip(axes, sizes, strict=True):
                    assert size in range(axis.grain, axis.size + 1, axis.grain)


def test_independent_covers_the_grid_evenly() -> None:
    schedule, source = Independent(RANKS), generator()
    drawn = [size for step in range(800) for sizes in schedule.draw(step, source) for size in sizes]
    counts = {size: drawn.count(size) for size in range(8, 65, 8)}
    assert sum(counts.values()) == len(drawn) == 4000
    assert all(400 < count < 600 for count in counts.values())


def test_axes_are_drawn_apart() -> None:
    (sizes,) = Independent(tuple(Axis(str(n), 64, 8) for n in range(50))).draw(0, generator())
    assert len(set(sizes)) == 8


def test_a_ladder_goes_from_small_to_large_and_a_cycle_takes_one_rung_a_step() -> None:
    rungs = uniform_rungs(RANKS, (0.75, 0.25, 0.5))
    drawn = Ladder(RANKS, rungs).draw(0, generator())
    assert drawn == [(16,) * 5, (32,) * 5, (48,) * 5]
    cycle = Cycle(RANKS, rungs)
    assert [cycle.draw(step, generator())[0] for step in range(4)] == [*drawn, drawn[0]]


def test_a_sandwich_has_the_smallest_and_the_largest() -> None:
    drawn = Sandwich(RANKS, random=2).draw(0, generator())
    assert drawn[:2] == [(8,) * 5, (64,) * 5]
    assert len(drawn) == 4


def test_a_grain_that_does_not_divide_ends_at_the_full_size() -> None:
    axis = Axis("dim", 20, 8)
    assert [axis.at(level) for level in range(1, axis.levels + 1)] == [8, 16, 20]
    assert [axis.within(fraction) for fraction in (0.1, 0.4, 0.8, 1.0)] == [8, 8, 16, 20]


def test_decimal_fractions_round_as_people_expect() -> None:
    assert Axis("dim", 100, 1).within(0.29) == 29


@pytest.mark.parametrize("axes", [RANKS, EMBEDDING], ids=["ranks", "embedding"])
def test_json_gives_the_same_schedule_back(axes: tuple[Axis, ...]) -> None:
    for schedule in every_schedule(axes):
        again = schedule_from_json(json.loads(json.dumps(schedule.to_json())))
        assert again == schedule
        assert type(again) is type(schedule)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TrainingError, match="grain 9"):
        Axis("dim", 8, 9)
    with pytest.raises(TrainingError, match="at least one rung"):
        Ladder(RANKS, ())
    with pytest.raises(TrainingError, match="2 sizes for 5 axes"):
        Cycle(RANKS, ((8, 8),))
    with pytest.raises(TrainingError, match="size 65"):
        Ladder(RANKS, ((65, 8, 8, 8, 8),))
    with pytest.raises(TrainingError, match="random -1"):
        Sandwich(RANKS, random=-1)
    with pytest.raises(TrainingError, match="'lottery' must be one of"):
        schedule_from_json({"kind": "lottery"})


def test_the_smallest_sizes_are_those_that_draws_reach() -> None:
    axes = (Axis("a", 16, 4), Axis("b", 10, 4))
    assert Independent(axes).smallest == (4, 4)
    assert Sandwich(axes).smallest == (4, 4)
    assert Ladder(axes, ((8, 10), (16, 4))).smallest == (8, 4)
