"""Rank tables: which columns every layer, side and KV head keeps, at how many bits, and the bytes.

A layer either keeps every token or has a sliding window. Those with a short window stay at full
width, all others are compressed. The budget is a fraction of the bytes of one token in the
compressed ones; `RankTable.nbytes` and `held` count all layers, and what their windows hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from matkv.codes import Bands, has_codes, plain_bands, row_bytes
from matkv.errors import BudgetError, RankError
from matkv.files import digest
from matkv.geometry import LEAST_WINDOW as LEAST_WINDOW
from matkv.geometry import Geometry as Geometry
from matkv.geometry import LayerShape as LayerShape
from matkv.geometry import default_step as default_step
from matkv.schedule import whole_grains

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")
Cell = tuple[int, Side, int]  # layer, side, head


LayerRanks = tuple[int, ...]
LayerBands = tuple[Bands, ...]
HALF = 2  # bytes of one number of a full cache, as far as budgets are concerned


@dataclass(frozen=True)
class RankTable:
    """Ranks of every layer, side and KV head: `key[layer][head]`, `value[layer][head]`.

    Layers that are not compressed are listed at their full head dim. Zero is a rank: key rank zero
    attends evenly to all visible tokens, value rank zero makes the head's output zero.

    `coded` holds the bands of heads with columns kept as codes (`matkv.codes`); a rank is their
    sum. All other columns are kept in the model's dtype.

    Raises:
        RankError: a rank is outside 0..head_dim, bands do not add up to their rank, or the table
            does not have the geometry's shape.
    """

    geometry: Geometry
    key: tuple[LayerRanks, ...]
    value: tuple[LayerRanks, ...]
    coded: Mapping[Cell, Bands] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side in SIDES:
            table = self.side(side)
            if len(table) != len(self.geometry.layers):
                raise RankError(
                    f"the {side} table has {len(table)} layers, "
                    f"the model has {len(self.geometry.layers)}"
                )
            for index, (ranks, shape) in enumerate(zip(table, self.geometry.layers, strict=True)):
                _check_layer(side, index, ranks, shape)
        for cell, bands in self.coded.items():
            self._check_bands(cell, bands)

    def __hash__(self) -> int:
        return hash((self.geometry, self.key, self.value, tuple(sorted(self.coded.items()))))

    def _check_bands(self, cell: Cell, bands: Bands) -> None:
        layer, side, head = cell
        where = f"{side} bands of layer {layer}, head {head}"
        is_cell = side in SIDES and layer in self.geometry.compressed
        if not is_cell or not 0 <= head < self.geometry.layers[layer].kv_heads:
            raise RankError(f"{where}: there is no such head that is compressed")
        if len(bands) != 4 or not all(type(one) is int and one >= 0 for one in bands):
            raise RankError(f"{where}: {bands!r} must be columns at 16, 8, 4 and 2 bits")
        rank = self.side(side)[layer][head]
        if not has_codes(bands) or sum(bands) != rank:
            raise RankError(f"{where}: {bands} must have codes, and add up to the rank {rank}")

    def side(self, side: Side) -> tuple[LayerRanks, ...]:
        """The ranks of all layers' heads on one side."""
        return self.key if side == "key" else self.value

    # ---- making tables

    @classmethod
    def full(cls, geometry: Geometry) -> RankTable:
        """Every rank at its head dim: nothing is lost and nothing is saved."""
        ranks = tuple((shape.head_dim,) * shape.kv_heads for shape in geometry.layers)
        return cls(geometry, ranks, ranks)

    @classmethod
    def uniform(cls, geometry: Geometry, budget: float, *, step: int | None = None) -> RankTable:
        """The same rank everywhere: the largest multiple of `step` within `budget`.

        `step` is each layer's `default_step` unless given.

        Raises:
            BudgetError: `budget` is outside (0, 1], or smaller than one `step`.
        """
        return cls.uniform_sides(geometry, budget, budget, step=step)

    @classmethod
    def uniform_sides(
        cls, geometry: Geometry, key_budget: float, value_budget: float, *, step: int | None = None
    ) -> RankTable:
        """One rank for all keys and another for all values, each within its own budget.

        Raises:
            BudgetError: a budget is outside (0, 1], or smaller than one `step`.
        """
        sides = [
            tuple(
                (_uniform_rank(shape, budget, step),) * shape.kv_heads for shape in geometry.layers
            )
            for budget in (key_budget, value_budget)
        ]
        return cls(geometry, sides[0], sides[1])

    @classmethod
    def banded(cls, geometry: Geometry, bands: Mapping[Cell, Bands]) -> RankTable:
        """The table of these bands; what is not named stays at full rank."""
        ranks = {cell: sum(one) for cell, one in bands.items()}
        coded = {cell: one for cell, one in bands.items() if has_codes(one)}
        return replace(cls.full(geometry).changed(ranks), coded=coded)

    def changed(self, ranks: Mapping[Cell, int]) -> RankTable:
        """The same table with other ranks, and no codes, at some (layer, side, head)."""
        key, value = (
            tuple(
                tuple(ranks.get((layer, side, head), rank) for head, rank in enumerate(heads))
                for layer, heads in enumerate(self.side(side))
            )
            for side in SIDES
        )
        coded = {cell: bands for cell, bands in self.coded.items() if cell not in ranks}
        return RankTable(self.geometry, key, value, coded)

    # ---- arithmetic: nobody else counts the bytes of a cache

    def compressed_ranks(self) -> Iterator[tuple[int, Side, int, int]]:
        """(layer, side, head, rank) of every rank in a compressed layer."""
        for layer in self.geometry.compressed:
            for side in SIDES:
                for head, rank in enumerate(self.side(side)[layer]):
                    yield layer, side, head, rank

    def bands(self, layer: int, side: Side) -> LayerBands:
        """The bands of a layer's heads."""
        return tuple(
            self.coded.get((layer, side, head), plain_bands(rank))
            for head, rank in enumerate(self.side(side)[layer])
        )

    def is_coded(self, layer: int) -> bool:
        return any(cell[0] == layer for cell in self.coded)

    def bits(self, layer: int, side: Side) -> list[float]:
        """Bits that every head of a layer spends on a column of its head dim, its gain counted."""
        dim = self.geometry.layers[layer].head_dim
        return [8 * row_bytes(bands, HALF) / dim for bands in self.bands(layer, side)]

    @property
    def columns(self) -> int:
        """Columns that are kept, at whatever width, of all compressed layers."""
        return sum(rank for *_, rank in self.compressed_ranks())

    @property
    def budget(self) -> float:
        """Kept over full bytes of a token in a dtype of 16 bits, of the compressed layers."""
        return self._row_bytes(HALF) / (HALF * self.geometry.columns)

    def share(self, side: Side) -> float:
        """`budget` of one side alone."""
        return self._row_bytes(HALF, (side,)) / self.geometry.columns

    def held(self, tokens: int, *, sink: int = 0, recent: int = 0) -> float:
        """Held over full bytes of the whole cache after so many tokens, in a dtype of 16 bits.

        Exact tokens are counted, and layers with a sliding window.
        """
        full = RankTable.full(self.geometry).nbytes(tokens, torch.float16)
        return self.nbytes(tokens, torch.float16, sink=sink, recent=recent) / full

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token of one sequence in the compressed layers.

        So much is added by one more, up to the length of the shortest sliding window.
        """
        return self._row_bytes(dtype.itemsize)

    def added_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one more token of one sequence adds where all sliding windows are full."""
        layers = [i for i in self.geometry.compressed if self.geometry.layers[i].window is None]
        return sum(self._layer_bytes(layer, dtype.itemsize) for layer in layers)

    def heads_bytes(self, layer: int, heads: Iterable[int], dtype: torch.dtype) -> int:
        """Bytes of one token of some heads of a layer, keys and values."""
        sides = [self.bands(layer, side) for side in SIDES]
        return sum(row_bytes(bands[head], dtype.itemsize) for head in heads for bands in sides)

    def nbytes(
        self, tokens: int, dtype: torch.dtype, *, batch: int = 1, sink: int = 0, recent: int = 0
    ) -> int:
        """Bytes the cache holds for `batch` sequences of `tokens` tokens each.

        A layer with a sliding window holds its last window - 1 tokens. Full width have the first
        `sink` tokens while they are held, the last `recent` ones, and all of layers that are not
        compressed.
        """
        total = 0
        for layer, shape in enumerate(self.geometry.layers):
            held = exact = shape.held(tokens)
            if shape.is_compressed:
                exact = min(held, max(0, sink - (tokens - held)) + recent)
                total += (held - exact) * self._layer_bytes(layer, dtype.itemsize)
            total += exact * shape.columns * dtype.itemsize
        return total * batch

    def staying_nbytes(self, tokens: int, dtype: torch.dtype, *, batch: int = 1) -> int:
        """`nbytes` of the layers that are not compressed."""
        shapes = [shape for shape in self.geometry.layers if not shape.is_compressed]
        return batch * sum(s.held(tokens) * s.columns for s in shapes) * dtype.itemsize

    def _row_bytes(self, itemsize: int, sides: tuple[Side, ...] = SIDES) -> int:
        """Bytes of one token in the compressed layers."""
        return sum(self._layer_bytes(layer, itemsize, sides) for layer in self.geometry.compressed)

    def _layer_bytes(self, layer: int, itemsize: int, sides: tuple[Side, ...] = SIDES) -> int:
        return sum(row_bytes(one, itemsize) for side in sides for one in self.bands(layer, side))

    @property
    def digest(self) -> str:
        """A short name of the table."""
        return digest(json.dumps(self.to_json()).encode())

    # ---- JSON

    def to_json(self) -> dict[str, Any]:
        """Lists of each layer's ranks, by side; and the bands of the heads that have codes."""
        ranks = {side: [list(ranks) for ranks in self.side(side)] for side in SIDES}
        coded = [[*cell, list(bands)] for cell, bands in sorted(self.coded.items())]
        return ranks | ({"coded": coded} if coded else {})

    @classmethod
    def from_json(cls, geometry: Geometry, data: dict[str, Any]) -> RankTable:
        """Inverse of `to_json`.

        Raises:
            RankError: `data` is not a table for `geometry`.
        """
        try:
            key, value = (tuple(tuple(ranks) for ranks in data[side]) for side in SIDES)
            coded = {
                (layer, side, head): tuple(bands)
                for layer, side, head, bands in data.get("coded", ())
            }
        except (KeyError, TypeError, ValueError) as error:
            raise RankError(
                'a rank table is {"key": [[rank of each head] of each layer], "value": ...}; '
                f"this one is not ({type(error).__name__}: {error})"
            ) from None
        return cls(geometry, key, value, coded)


def check_budget(budget: float) -> float:
    """`budget` itself.

    Raises:
        BudgetError: it is not in (0, 1].
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise BudgetError(
            f"budget {budget} must be in (0, 1]: the fraction of cache bytes to keep, 0.5 for half"
        )
    return float(budget)


# The type of a budget in settings.
Budget = Annotated[float, Field(allow_inf_nan=True), AfterValidator(check_budget)]


def _uniform_rank(shape: LayerShape, budget: float, step: int | None) -> int:
    check_budget(budget)
    step = default_step(shape.head_dim) if step is None else step
    if not 1 <= step <= shape.head_dim and shape.is_compressed:
        raise RankError(f"step {step} must be in 1..{shape.head_dim}, the head dim")
    if not shape.is_compressed or budget == 1:
        return shape.head_dim
    rank = whole_grains(budget, shape.head_dim, step) * step
    if rank == 0:
        raise BudgetError(
            f"budget {budget} is below one step of {step} columns of {shape.head_dim}; "
            f"use a budget of at least {step / shape.head_dim:g} or a smaller step"
        )
    return rank


def _check_layer(side: Side, index: int, ranks: LayerRanks, shape: LayerShape) -> None:
    where = f"{side} ranks of layer {index}"
    if len(ranks) != shape.kv_heads:
        raise RankError(f"{where}: {len(ranks)} given, the layer has {shape.kv_heads} KV heads")
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= shape.head_dim:
            raise RankError(f"{where}: rank {rank!r} must be a whole number in 0..{shape.head_dim}")
    if not shape.is_compressed and set(ranks) != {shape.head_dim}:
        raise RankError(
            f"{where}: {ranks} given, but a layer with a sliding window stays at {shape.head_dim}"
        )
