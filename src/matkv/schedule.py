"""Schedules: which sizes a training step covers, so that one training serves all of them.

A model has axes that can be cut to a prefix: a rank for every layer, side and KV head, or the
layers and the width of an embedding model. A schedule draws, for a step, a list of assignments of
one size to every axis; the step's loss is the mean over the list.

    Independent   one assignment, every axis uniform over its grid (arXiv 2410.14731, section 4.2)
    Ladder        always the same assignments, from small to large (arXiv 2410.13230)
    Cycle         one rung of a ladder a step
    Sandwich      the smallest, the largest and `random` independent ones (arXiv 1903.05134)

The same step and generator state give the same draw. Nothing here knows about models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from matkv.errors import TrainingError

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """Something that can be cut to `grain`, 2 `grain`, ... `size`, whatever it is called.

    Raises:
        TrainingError: `grain` is not in 1..`size`.
    """

    name: str
    size: int
    grain: int

    def __post_init__(self) -> None:
        if not 1 <= self.grain <= self.size:
            raise TrainingError(f"grain {self.grain} of {self.name} must be in 1..{self.size}")

    @property
    def levels(self) -> int:
        """How many sizes the grid has."""
        return -(-self.size // self.grain)

    def at(self, level: int) -> int:
        """The size of level 1..`levels`."""
        return min(level * self.grain, self.size)

    def within(self, fraction: float) -> int:
        """The largest size of the grid within `fraction` of the axis, at least one grain."""
        if fraction >= 1:
            return self.size
        return self.at(max(1, whole_grains(fraction, self.size, self.grain)))


def whole_grains(fraction: float, size: int, grain: int) -> int:
    """How many grains lie within a fraction of a size: the one rule by which budgets round."""
    # The tiny addend keeps 0.29 * 100 == 28.999999999999996 at 29.
    return int(fraction * size / grain + 1e-9)


class Schedule(Protocol):
    """What every schedule does."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What is cut; a draw's sizes follow this order."""
        ...

    def draw(self, step: int, generator: torch.Generator) -> list[Sizes]:
        """The assignments that `step` covers, each with one size for every axis."""
        ...

    @property
    def smallest(self) -> Sizes:
        """The smallest size that any draw has, for every axis."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain data that `schedule_from_json` turns back into the same schedule."""
        ...


@dataclass(frozen=True)
class Independent:
    """One assignment a step, every axis drawn by itself, uniformly over its grid."""

    kind: ClassVar[str] = "independent"
    axes: tuple[Axis, ...]

    def draw(self, step: int, generator: torch.Generator) -> list[Sizes]:
        return [_random(self.axes, generator)]

    @property
    def smallest(self) -> Sizes:
        return tuple(axis.at(1) for axis in self.axes)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "axes": _axes_to_json(self.axes)}


@dataclass(frozen=True)
class Ladder:
    """The same rungs every step, sorted from small to large.

    Raises:
        TrainingError: there is no rung, or one that does not fit the axes.
    """

    kind: ClassVar[str] = "ladder"
    axes: tuple[Axis, ...]
    rungs: tuple[Sizes, ...]

    def __post_init__(self) -> None:
        if not self.rungs:
            raise TrainingError(f"a {self.kind} needs at least one rung")
        for rung in self.rungs:
            _check_rung(self.axes, rung)
        object.__setattr__(self, "rungs", tuple(sorted(self.rungs, key=sum)))

    def draw(self, step: int, generator: torch.Generator) -> list[Sizes]:
        return list(self.rungs)

    @property
    def smallest(self) -> Sizes:
        return tuple(min(sizes) for sizes in zip(*self.rungs, strict=True))

    def to_json(self) -> dict[str, Any]:
        rungs = [list(rung) for rung in self.rungs]
        return {"kind": self.kind, "axes": _axes_to_json(self.axes), "rungs": rungs}


class Cycle(Ladder):
    """One rung a step, in turn."""

    kind: ClassVar[str] = "cycle"

    def draw(self, step: int, generator: torch.Generator) -> list[Sizes]:
        return [self.rungs[step % len(self.rungs)]]


@dataclass(frozen=True)
class Sandwich:
    """The smallest sizes, the largest, and `random` independent draws."""

    kind: ClassVar[str] = "sandwich"
    axes: tuple[Axis, ...]
    random: int = 1

    def __post_init__(self) -> None:
        if self.random < 0:
            raise TrainingError(f"random {self.random} must be a number of draws, 0 for none")

    def draw(self, step: int, generator: torch.Generator) -> list[Sizes]:
        largest = tuple(axis.size for axis in self.axes)
        return [
            self.smallest,
            largest,
            *(_random(self.axes, generator) for _ in range(self.random)),
        ]

    @property
    def smallest(self) -> Sizes:
        return tuple(axis.at(1) for axis in self.axes)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "axes": _axes_to_json(self.axes), "random": self.random}


def uniform_rungs(axes: Sequence[Axis], fractions: Sequence[float]) -> tuple[Sizes, ...]:
    """Rungs that cut every axis to the same fraction, rounded down to its grid."""
    return tuple(tuple(axis.within(fraction) for axis in axes) for fraction in fractions)


def schedule_from_json(data: dict[str, Any]) -> Schedule:
    """Inverse of `to_json`.

    Raises:
        TrainingError: the kind is unknown.
    """
    makers: dict[str, Callable[..., Schedule]] = {
        one.kind: one for one in (Independent, Ladder, Cycle, Sandwich)
    }
    options = dict(data)
    kind = options.pop("kind", None)
    if kind not in makers:
        raise TrainingError(f"schedule {kind!r} must be one of {', '.join(makers)}")
    options["axes"] = _axes_from_json(options["axes"])
    if "rungs" in options:
        options["rungs"] = tuple(tuple(rung) for rung in options["rungs"])
    return makers[kind](**options)


def _random(axes: tuple[Axis, ...], generator: torch.Generator) -> Sizes:
    numbers = torch.rand(len(axes), generator=generator, dtype=torch.float64).tolist()
    return tuple(
        axis.at(1 + int(number * axis.levels)) for axis, number in zip(axes, numbers, strict=True)
    )


def _check_rung(axes: tuple[Axis, ...], rung: Sizes) -> None:
    if len(rung) != len(axes):
        raise TrainingError(f"a rung has {len(rung)} sizes for {len(axes)} axes")
    for axis, size in zip(axes, rung, strict=True):
        if not 0 <= size <= axis.size:
            raise TrainingError(f"size {size} of {axis.name} must be in 0..{axis.size}")


def _axes_to_json(axes: tuple[Axis, ...]) -> list[dict[str, Any]]:
    """Axes in order, those with equal grids that follow one another together."""
    groups: list[dict[str, Any]] = []
    for axis in axes:
        grid = {"size": axis.size, "grain": axis.grain}
        if groups and groups[-1].items() >= grid.items():
            groups[-1]["names"].append(axis.name)
        else:
            groups.append({**grid, "names": [axis.name]})
    return groups


def _axes_from_json(groups: list[dict[str, Any]]) -> tuple[Axis, ...]:
    return tuple(
        Axis(name, group["size"], group["grain"]) for group in groups for name in group["names"]
    )
