"""All bases of a model as one module, and the ranks they are cut to.

Shapes: B sequence, K draws of ranks a sequence, X matrices (one for each layer, side and KV head),
G KV head, D head dim.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from torch import Tensor, nn

from matkv.artifact.artifact import Artifact
from matkv.bases.gates import gated, rank_gate
from matkv.bases.learned import LearnedMaps, Parametrization
from matkv.bases.maps import Maps
from matkv.ranks import SIDES, Geometry, RankTable, Side, default_step
from matkv.schedule import Axis, Sizes


def rank_axes(geometry: Geometry, step: int | None = None) -> tuple[Axis, ...]:
    """One axis for every compressed layer, side and KV head: the X of this file, in order."""
    return tuple(
        Axis(f"{layer}.{side}.{head}", dim, step or default_step(dim))
        for layer, side, head, dim in RankTable.full(geometry).compressed_ranks()
    )


def sizes_of(table: RankTable) -> Sizes:
    """A rank table's ranks in the order of `rank_axes`."""
    return tuple(rank for *_, rank in table.compressed_ranks())


class Bases(nn.Module):
    """The learned maps of all compressed layers; those of equal head dim in one tensor."""

    def __init__(self, artifact: Artifact, kind: Parametrization) -> None:
        super().__init__()
        self.geometry = artifact.geometry
        self.heads = {
            (layer, side): artifact.geometry.layers[layer].kv_heads
            for layer in artifact.geometry.compressed
            for side in SIDES
        }
        self.places: dict[str, list[tuple[int, Side]]] = {}
        for layer, side in self.heads:
            dim = str(artifact.geometry.layers[layer].head_dim)
            self.places.setdefault(dim, []).append((layer, side))
        stacks = {
            dim: _stack([artifact.maps(*place) for place in places])
            for dim, places in self.places.items()
        }
        self.start = _digest(stacks)  # names what is learned from
        self.groups = nn.ModuleDict({dim: LearnedMaps(maps, kind) for dim, maps in stacks.items()})

    def forward(self, sizes_BX: Tensor) -> dict[tuple[int, Side], Tensor]:
        """P of every layer and side at given ranks, [BGDD] in fp32."""
        columns = sizes_BX.split(list(self.heads.values()), dim=1)
        sizes = dict(zip(self.heads, columns, strict=True))
        products: dict[tuple[int, Side], Tensor] = {}
        for dim, places in self.places.items():
            open_BXD = rank_gate(torch.cat([sizes[place] for place in places], dim=1), int(dim))
            product_BXDD = gated(self.groups[dim](), open_BXD)
            heads = [self.heads[place] for place in places]
            products |= zip(places, product_BXDD.split(heads, dim=1), strict=True)
        return products

    def maps(self) -> dict[tuple[int, Side], Maps]:
        """The maps of every layer and side as they are now, [GDD], differentiable."""
        maps: dict[tuple[int, Side], Maps] = {}
        for dim, places in self.places.items():
            learned: Maps = self.groups[dim]()
            first = 0
            for place in places:
                rows = slice(first, first := first + self.heads[place])
                maps[place] = learned.changed(partial(_rows, rows=rows))
        return maps

    def export(self) -> dict[int, dict[Side, Maps]]:
        """The maps as they are now, detached."""
        layers: dict[int, dict[Side, Maps]] = {}
        for dim, places in self.places.items():
            learned: Maps = self.groups[dim].export()  # type: ignore[operator]
            first = 0
            for layer, side in places:
                rows = slice(first, first := first + self.heads[layer, side])
                layers.setdefault(layer, {})[side] = learned.changed(partial(_copied, rows=rows))
        return layers


def _rows(x_XDD: Tensor, rows: slice) -> Tensor:
    return x_XDD[rows]


def _copied(x_XDD: Tensor, rows: slice) -> Tensor:
    return x_XDD[rows].clone()


def _stack(maps: list[Maps]) -> Maps:
    encode_XDD = torch.cat([heads.encode_XDD for heads in maps])
    if all(heads.is_orthogonal for heads in maps):
        return Maps.orthogonal(encode_XDD)
    return Maps(encode_XDD, torch.cat([heads.decode_XDD for heads in maps]))


def _digest(stacks: dict[str, Maps]) -> str:
    total = hashlib.sha256()
    for maps in stacks.values():
        for map_XDD in (maps.encode_XDD, maps.decode_XDD):
            total.update(map_XDD.detach().cpu().float().contiguous().numpy().tobytes())
    return total.hexdigest()
