"""Keys and values truncated on the spot, without a cache: what training and search attend on.

Shapes: B batch, G KV head, T token, D head dim."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from matkv.bases.maps import Maps
from matkv.ranks import SIDES, Side


class Projected:
    """One layer's keys and values multiplied by square matrices, [GDD] or one a sequence [BGDD].

    With P = encode diag(gate) decode^T, attention on them equals attention on latents, and queries
    and outputs need no work. None leaves a side as it is. The `recent` tokens before a query are
    exact.
    """

    key: Tensor | None = None
    value: Tensor | None = None

    def __init__(self, recent: int = 0) -> None:
        self.recent = recent

    def matrices(self) -> tuple[Tensor | None, Tensor | None]:
        """P of keys and of values."""
        return self.key, self.value

    def __call__(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.matrices()
        if key is not None:
            key_BGTD = key_BGTD @ key.to(key_BGTD.dtype)
        if value is not None:
            value_BGTD = value_BGTD @ value.to(value_BGTD.dtype)
        return key_BGTD, value_BGTD


class GatedProjection(Projected):
    """A gate on every column of one layer's bases, for search.

    A column with gate 0 is dropped, with gate 1 kept, so that ranks change without new bases and
    gradients reach the gates. With the gates of a rank table it equals `LayerProjection` at that
    table. The gates of a side are [GD], or [BGD] for one table a sequence.
    """

    def __init__(self, maps: Mapping[Side, Maps], *, recent: int = 0) -> None:
        super().__init__(recent)
        self.maps = maps
        self.gates: dict[Side, Tensor] = {
            side: heads.encode_XDD.new_ones(heads.encode_XDD.shape[:2])
            for side, heads in maps.items()
        }

    def matrices(self) -> tuple[Tensor, Tensor]:
        key, value = (gated(self.maps[side], self.gates[side]) for side in SIDES)
        return key, value

    def open(self, side: Side, ranks_XG: Tensor) -> None:
        """Keep the first columns of every head of a side, as many as its rank."""
        encode_GDD = self.maps[side].encode_XDD
        self.gates[side] = rank_gate(ranks_XG, encode_GDD.shape[-1]).to(encode_GDD)


def gated(maps: Maps, gate_XD: Tensor) -> Tensor:
    """encode diag(gate) decode^T.  [..., G, D -> ..., G, D, D]"""
    gate_XD = gate_XD.to(maps.encode_XDD.dtype)
    return (maps.encode_XDD * gate_XD[..., None, :]) @ maps.decode_XDD.mT


def rank_gate(ranks_X: Tensor, dim: int) -> Tensor:
    """True at the first `ranks` of `dim` columns.  [X -> XD]"""
    return torch.arange(dim, device=ranks_X.device) < ranks_X[..., None]
