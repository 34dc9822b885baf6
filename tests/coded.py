"""Tiny models whose artifacts have codes, and tables of bands drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import matkv
from matkv.allocate.noise import with_quantizers
from matkv.codes import WIDTHS, Bands
from matkv.hf.observe import fit_quantizers
from matkv.ranks import SIDES, Cell, Geometry, RankTable
from tiny import Tiny, tiny, tokens


@dataclass(frozen=True)
class Coded(Tiny):
    """A tiny model whose ragged tables have codes."""

    def ragged(self, seed: int = 0) -> RankTable:
        return ragged_bands(self.geometry, seed)


def room(subject: Tiny, tolerance: float) -> float:
    """What rounding may change: with codes a coordinate may fall to the other side of an edge."""
    return 0.02 if isinstance(subject, Coded) else tolerance


def ragged_bands(geometry: Geometry, seed: int = 0) -> RankTable:
    """Bands of every kind, odd counts, plain heads and empty ones among them."""
    rng = random.Random(seed)
    bands: dict[Cell, Bands] = {}
    for layer in geometry.compressed:
        shape = geometry.layers[layer]
        for side in SIDES:
            for head in range(shape.kv_heads):
                bands[layer, side, head] = random_bands(rng, shape.head_dim)
    return RankTable.banded(geometry, bands)


def random_bands(rng: random.Random, dim: int) -> Bands:
    """Bands of one head's side: of all widths or of one, without codes, or none."""
    kind = rng.choice(["mixed"] * 4 + ["one", "plain", "none"])
    if kind == "none":
        return 0, 0, 0, 0
    if kind == "plain":
        return rng.randint(1, dim), 0, 0, 0
    if kind == "one":
        place, columns = rng.randrange(len(WIDTHS)), rng.randint(1, dim)
        counts = [columns if index == place else 0 for index in range(len(WIDTHS))]
    else:
        cuts = sorted(rng.randint(0, dim) for _ in WIDTHS)
        counts = [cuts[0], *(last - first for first, last in pairwise(cuts))]
    sixteen, eight, four, two = counts
    return sixteen, eight, four, two


@cache
def coded(name: str) -> Coded:
    """The model of a family, with quantizers fitted to its bases."""
    subject = tiny(name)
    artifact = subject.artifact
    maps = {
        layer: {side: artifact.maps(layer, side) for side in SIDES}
        for layer in artifact.geometry.compressed
    }
    sequences = [{"input_ids": tokens(1, 48, seed=seed)[0]} for seed in range(4)]
    fitted = fit_quantizers(subject.model, maps, sequences)
    return Coded(subject.model, with_quantizers(artifact, fitted))


KINDS: dict[str, Callable[[str], Tiny]] = {"ranks": tiny, "codes": coded}


def lent(kind: str, name: str) -> Iterator[Tiny]:
    """A tiny model for a fixture, handed back detached and able to learn."""
    subject = KINDS[kind](name)
    yield subject
    matkv.detach(subject.model)
    subject.model.requires_grad_(True)
