"""Sizes of an embedding model: (layer, dimension), written 2x64, and schedules over them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import product

from sentence_transformers import SentenceTransformer

from matkv.embeddings.depth import backbone_of
from matkv.errors import SizeError
from matkv.schedule import Axis, Ladder, Schedule

Size = tuple[int, int]

# What share of the dimensions each of six rungs has; other counts lie between these.
SHARES = (1 / 12, 1 / 6, 1 / 4, 1 / 2, 2 / 3, 1.0)
# Dimensions of larger models are multiples of this: index structures and kernels like them.
GRAIN = 8


def parse(text: str) -> tuple[Size, ...]:
    """The sizes of "1x32,2x64", from small to large.

    Raises:
        SizeError: one is not LAYERxDIMENSION, both at least 1, or is named twice.
    """
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})x(\d{1,9})\s*", part, re.ASCII)
        if found is None or not all(int(number) for number in found.groups()):
            raise SizeError(f"size {part.strip()!r} must be LAYERxDIMENSION, as 2x64")
        sizes.append((int(found[1]), int(found[2])))
    twice = [name(size) for size in dict.fromkeys(sizes) if sizes.count(size) > 1]
    if twice:
        raise SizeError(f"size {twice[0]} is named twice: name each once")
    return tuple(sorted(sizes))


def name(size: Size) -> str:
    """2x64 for (2, 64)."""
    return f"{size[0]}x{size[1]}"


def full_size(model: SentenceTransformer) -> Size:
    """All layers and all dimensions that `model` serves.

    Raises:
        UnsupportedModelError: it has no layers to cut.
    """
    return backbone_of(model).layers, dimensions(model)


def dimensions(model: SentenceTransformer) -> int:
    """How many dimensions an embedding of `model` has.

    Raises:
        SizeError: the model does not say.
    """
    dim = model.get_embedding_dimension()
    if dim is None:
        raise SizeError("the model does not say how many dimensions its embeddings have")
    return int(dim)


def check(sizes: Iterable[Size], full: Size) -> tuple[Size, ...]:
    """The sizes, once it is sure that a model of size `full` has them.

    Raises:
        SizeError: there is none, or one is outside of the model.
    """
    checked = tuple((int(layer), int(dim)) for layer, dim in sizes)
    if not checked:
        raise SizeError("no size is given: name at least one, as 2x64")
    for layer, dim in checked:
        if not 1 <= layer <= full[0]:
            raise SizeError(f"layer {layer} of {name((layer, dim))} must be in 1..{full[0]}")
        if not 1 <= dim <= full[1]:
            raise SizeError(f"dimension {dim} of {name((layer, dim))} must be in 1..{full[1]}")
    return checked


def default_rungs(layers: int, dim: int, count: int = 6) -> tuple[Size, ...]:
    """`count` sizes up to (`layers`, `dim`): layers evenly, dimensions from a twelfth upwards.

    6 layers of 384 dimensions give 1x32, 2x64, 3x96, 4x192, 5x256, 6x384. Models with few layers or
    dimensions get fewer sizes.

    Raises:
        SizeError: a number is below 1.
    """
    if min(layers, dim, count) < 1:
        raise SizeError(
            f"{count} rungs of {layers} layers and {dim} dimensions: all must be above 0"
        )
    rungs = []
    for rung in range(1, count + 1):
        wanted = dim * _share((rung - 1) / max(1, count - 1) if count > 1 else 1.0)
        grain = GRAIN if wanted >= GRAIN and rung < count else 1
        layer = max(1, round(layers * rung / count))
        rungs.append((layer, max(1, round(wanted / grain) * grain)))
    return tuple(dict.fromkeys(rungs))


def _share(place: float) -> float:
    """The share at `place` in 0..1 along SHARES, geometrically between two of them."""
    at = place * (len(SHARES) - 1)
    low = min(int(at), len(SHARES) - 2)
    ends = [math.log(share) for share in SHARES[low : low + 2]]
    return math.exp(ends[0] + (at - low) * (ends[1] - ends[0]))


def size_axes(full: Size, grain: int = 1) -> tuple[Axis, Axis]:
    """Layers one by one, dimensions in steps of `grain`."""
    return Axis("layer", full[0], 1), Axis("dim", full[1], grain)


def ladder(model: SentenceTransformer, rungs: Sequence[Size] | None = None) -> Ladder:
    """A ladder over the layers and dimensions of `model`; `default_rungs` unless `rungs` are given.

    Raises:
        SizeError: a rung is outside of the model.
        UnsupportedModelError: the model has no layers to cut.
    """
    full = full_size(model)
    sizes = default_rungs(*full) if rungs is None else check(rungs, full)
    return Ladder(size_axes(full), sizes)


def covered(schedule: Schedule) -> tuple[Size, ...]:
    """Every size that some step of `schedule` may cover, from small to large."""
    if isinstance(schedule, Ladder):  # a Cycle is one too
        return tuple(sorted((layer, dim) for layer, dim in schedule.rungs))
    layers, dims = ([axis.at(n + 1) for n in range(axis.levels)] for axis in schedule.axes)
    return tuple(product(layers, dims))
