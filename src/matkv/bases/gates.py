"""Keys and values truncated on the spot, without a cache: what training and search attend on.

Shapes: B batch, G KV head, T token, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from matkv.bases.maps import Maps
from matkv.ranks import LayerRanks


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
    table. `key_gate` and `value_gate` are [GD], or [BGD] for one table a sequence.
    """

    def __init__(self, key: Maps, value: Maps, *, recent: int = 0) -> None:
        super().__init__(recent)
        self.key_maps, self.value_maps = key, value
        self.key_gate = self.value_gate = key.encode_XDD.new_ones(key.encode_XDD.shape[:2])

    def matrices(self) -> tuple[Tensor, Tensor]:
        return gated(self.key_maps, self.key_gate), gated(self.value_maps, self.value_gate)


def gated(maps: Maps, gate_XD: Tensor) -> Tensor:
    """encode diag(gate) decode^T.  [..., G, D -> ..., G, D, D]"""
    gate_XD = gate_XD.to(maps.encode_XDD.dtype)
    return (maps.encode_XDD * gate_XD[..., None, :]) @ maps.decode_XDD.mT


def rank_gate(ranks: LayerRanks, dim: int) -> Tensor:
    """Gates that keep the first `ranks[head]` columns of every head.  [GD]"""
    return (torch.arange(dim) < torch.tensor(ranks)[:, None]).float()
