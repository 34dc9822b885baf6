"""Names of lines in a picture, put where nothing else is.

Everything in pixels of the figure. A name stands beside one of its line's points, the last one if
it can, where it meets no other name, no marker, no line and no border; where there is no such
place, where it meets the least.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Pair = tuple[float, float]
RADII = (7, 12, 18, 26, 36, 48, 62)
ANGLES = (0, 20, -20, 40, -40, 65, -65, 90, -90, 115, -115, 140, -140, 160, -160, 180)
FAR = 24  # from here on a thin line leads from the name to its point


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    low: float
    right: float
    high: float

    @classmethod
    def around(cls, at: Pair, radius: float) -> Box:
        return cls(at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.low < other.high
            and other.low < self.high
        )

    def within(self, other: Box) -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.low <= self.low
            and self.high <= other.high
        )

    def crossed(self, start: Pair, end: Pair) -> bool:
        """Whether a line from `start` to `end` goes through it."""
        first, last = 0.0, 1.0
        for at, to, low, high in (
            (start[0], end[0], self.left, self.right),
            (start[1], end[1], self.low, self.high),
        ):
            if at == to:
                if not low <= at <= high:
                    return False
                continue
            enter, leave = sorted(((low - at) / (to - at), (high - at) / (to - at)))
            first, last = max(first, enter), min(last, leave)
        return first <= last


@dataclass(frozen=True)
class Place:
    """The middle of a name, and the point it stands for, which may be far."""

    cost: float
    at: Pair
    middle: Pair
    is_far: bool


@dataclass
class Room:
    """What is taken of a picture: its frame, and boxes and lines in it."""

    frame: Box
    boxes: list[Box] = field(default_factory=list)
    lines: list[tuple[Pair, Pair, float]] = field(default_factory=list)

    def add_line(self, points: Sequence[Pair], radius: float, weight: float) -> None:
        """A line through points with markers; `weight` says how bad it is to cross it."""
        pairs = itertools.pairwise(points)
        self.lines += [(start, end, weight) for start, end in pairs]
        self.boxes += [Box.around(at, radius) for at in points]

    def place(self, points: Sequence[Pair], size: Pair) -> Place:
        """Where a name of this size stands best, of a line whose last point comes first."""
        places = [
            self._place(at, size, radius, math.radians(angle), later)
            for later, at in enumerate(points)
            for radius in RADII
            for angle in ANGLES
        ]
        best = min(places, key=lambda one: one.cost)
        self.boxes.append(_box(best.middle, size))
        return best

    def _place(self, at: Pair, size: Pair, radius: float, angle: float, later: int) -> Place:
        middle = _middle(at, size, radius, angle)
        box = _box(middle, size)
        met = sum(box.meets(one) for one in self.boxes)
        crossed = sum(weight for *line, weight in self.lines if box.crossed(*line))
        outside = not box.within(self.frame)
        cost = 100 * outside + 10 * met + crossed + radius / 20 + 2 * later
        return Place(cost, at, middle, radius >= FAR)


def _middle(at: Pair, size: Pair, radius: float, angle: float) -> Pair:
    """The middle of a box that touches a circle around a point from outside."""
    x, y = math.cos(angle), math.sin(angle)
    return at[0] + radius * x + size[0] / 2 * _side(x), at[1] + radius * y + size[1] / 2 * y


def _side(x: float) -> float:
    """How far a box lies to a side: all of it unless it is above or below."""
    return math.copysign(1, x) if abs(x) > 0.3 else x / 0.3


def _box(middle: Pair, size: Pair) -> Box:
    return Box(
        middle[0] - size[0] / 2, middle[1] - size[1] / 2,
        middle[0] + size[0] / 2, middle[1] + size[1] / 2,
    )  # fmt: skip


def extent(axes: Any) -> Box:
    """The frame of some axes."""
    found = axes.get_window_extent()
    return Box(found.x0, found.y0, found.x1, found.y1)
