"""All bases of a model as one module, and the ranks they are cut to.

Shapes: B sequence, K draws of ranks a sequence, X matrices (one for each layer, side and KV head),
G KV head, D head dim.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from matkv.artifact.artifact import Artifact
from matkv.bases.gates import gated
from matkv.bases.learned import LearnedMaps, Parametrization
from matkv.bases.maps import Maps
from matkv.ranks import SIDES, Geometry, RankTable, Side, default_step
from matkv.schedule import Axis, Sizes


def rank_axes(geometry: Geometry, step: int | None = None) -> tuple[Axis, ...]:
    """One axis for every growing layer, side and KV head: the X of this file, in order."""
    return tuple(
        Axis(f"{layer}.{side}.{head}", dim, step or default_step(dim))
        for layer, side, head, dim in RankTable.full(geometry).growing_ranks()
    )


def sizes_of(table: RankTable) -> Sizes:
    """A rank table's ranks in the order of `rank_axes`."""
    return tuple(rank for *_, rank in table.growing_ranks())


class Bases(nn.Module):
    """The learned maps of all growing layers; those of equal head dim in one tensor."""

    def __init__(self, artifact: Artifact, kind: Parametrization) -> None:
        super().__init__()
        self.places: dict[tuple[int, Side], tuple[str, slice, slice]] = {}
        found: dict[str, list[Maps]] = {}
        first = 0
        for layer in artifact.geometry.growing:
            for side in SIDES:
                maps = artifact.maps(layer, side)
                heads, dim = maps.encode_XDD.shape[:2]
                group = found.setdefault(str(dim), [])
                inside = sum(len(one.encode_XDD) for one in group)
                self.places[layer, side] = (
                    str(dim),
                    slice(inside, inside + heads),
                    slice(first, first + heads),
                )
                group.append(maps)
                first += heads
        stacks = {dim: _stack(maps) for dim, maps in found.items()}
        self.start = _digest(stacks)  # names what is learned from
        self.groups = nn.ModuleDict({dim: LearnedMaps(maps, kind) for dim, maps in stacks.items()})

    def forward(self, sizes_BX: Tensor) -> dict[tuple[int, Side], Tensor]:
        """P of every layer and side at given ranks, [BGDD] in fp32."""
        learned = {dim: group() for dim, group in self.groups.items()}
        wanted: dict[str, list[Tensor]] = {dim: [] for dim in learned}
        for dim, _, columns in self.places.values():
            wanted[dim].append(sizes_BX[:, columns])
        made = {
            dim: truncated(learned[dim], torch.cat(sizes, dim=1)) for dim, sizes in wanted.items()
        }
        return {place: made[dim][:, rows] for place, (dim, rows, _) in self.places.items()}

    def export(self) -> dict[int, dict[Side, Maps]]:
        """The maps as they are now, detached."""
        learned = {dim: group.export() for dim, group in self.groups.items()}  # type: ignore[operator]
        layers: dict[int, dict[Side, Maps]] = {}
        for (layer, side), (dim, rows, _) in self.places.items():
            heads = learned[dim].changed(lambda x_XDD, rows=rows: x_XDD[rows].clone())
            layers.setdefault(layer, {})[side] = heads
        return layers


def truncated(maps: Maps, sizes_BX: Tensor) -> Tensor:
    """encode diag(gate) decode^T with the first `sizes` gates open.  [XDD, BX -> BXDD]"""
    column_D = torch.arange(maps.encode_XDD.shape[-1], device=sizes_BX.device)
    return gated(maps, column_D < sizes_BX[..., None])


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
