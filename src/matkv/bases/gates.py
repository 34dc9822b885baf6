"""Keys and values truncated on the spot, without a cache: what training and search attend on.

Shapes: B batch, G KV head, T token, D head dim."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from matkv.bases.maps import Maps
from matkv.bases.quantizer import Quantizer, requantized
from matkv.codes import widths_of
from matkv.ranks import SIDES, LayerBands, Side


class Projected:
    """One layer's keys and values multiplied by square matrices, [GDD] or one a sequence [BGDD].

    With P = encode diag(gate) decode^T, attention on them equals attention on latents, and queries
    and outputs need no work. None leaves a side as it is. The `recent` tokens before a query are
    exact, and the first `sink` slots.
    """

    key: Tensor | None = None
    value: Tensor | None = None

    def __init__(self, recent: int = 0, sink: int = 0) -> None:
        self.recent, self.sink = recent, sink

    def matrices(self) -> tuple[Tensor | None, Tensor | None]:
        """P of keys and of values."""
        return self.key, self.value

    def __call__(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.changed(key_BGTD, value_BGTD)
        return self._first_exact(key_BGTD, key), self._first_exact(value_BGTD, value)

    def changed(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they come out of a cache in which no token is exact."""
        key, value = self.matrices()
        if key is not None:
            key_BGTD = key_BGTD @ key.to(key_BGTD.dtype)
        if value is not None:
            value_BGTD = value_BGTD @ value.to(value_BGTD.dtype)
        return key_BGTD, value_BGTD

    def _first_exact(self, exact_BGTD: Tensor, x_BGTD: Tensor) -> Tensor:
        if not self.sink or x_BGTD is exact_BGTD:
            return x_BGTD
        return torch.cat((exact_BGTD[:, :, : self.sink], x_BGTD[:, :, self.sink :]), dim=2)


class GatedProjection(Projected):
    """A gate on every column of one layer's bases, for search.

    A column with gate 0 is dropped, with gate 1 kept, so that ranks change without new bases and
    gradients reach the gates. With the gates of a rank table it equals `LayerProjection` at that
    table. The gates of a side are [GD], or [BGD] for one table a sequence.

    With `quantizers` a side can also be coded: `widths` [GD] says how its columns are kept.
    """

    def __init__(
        self,
        maps: Mapping[Side, Maps],
        *,
        recent: int = 0,
        sink: int = 0,
        quantizers: Mapping[Side, Quantizer] | None = None,
    ) -> None:
        super().__init__(recent, sink)
        self.maps, self.quantizers = maps, quantizers or {}
        self.widths: dict[Side, Tensor] = {}
        self.gates: dict[Side, Tensor] = {
            side: heads.encode_XDD.new_ones(heads.encode_XDD.shape[:2])
            for side, heads in maps.items()
        }

    def matrices(self) -> tuple[Tensor, Tensor]:
        key, value = (gated(self.maps[side], self.gates[side]) for side in SIDES)
        return key, value

    def changed(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they come out of a cache in which no token is exact."""
        if not self.widths:
            return super().changed(key_BGTD, value_BGTD)
        key, value = (
            self._recoded(side, x_BGTD)
            for side, x_BGTD in zip(SIDES, (key_BGTD, value_BGTD), strict=True)
        )
        return key, value

    def _recoded(self, side: Side, x_BGTD: Tensor) -> Tensor:
        maps = self.maps[side]
        z_BGTD = x_BGTD.float() @ maps.encode_XDD
        back_BGTD = requantized(self.quantizers[side], z_BGTD, self.widths[side])
        return (back_BGTD @ maps.decode_XDD.mT).to(x_BGTD.dtype)

    def code(self, side: Side, bands: LayerBands) -> None:
        """Keep the columns of every head of a side in these bands."""
        encode_GDD = self.maps[side].encode_XDD
        self.widths[side] = band_widths(bands, encode_GDD.shape[-1]).to(encode_GDD.device)

    def open(self, side: Side, ranks_XG: Tensor) -> None:
        """Keep the first columns of every head of a side, as many as its rank."""
        self.widths.clear()  # a layer has codes on both sides, or none
        encode_GDD = self.maps[side].encode_XDD
        self.gates[side] = rank_gate(ranks_XG, encode_GDD.shape[-1]).to(encode_GDD)


def band_widths(bands: LayerBands, dim: int) -> Tensor:
    """The width of every column, 0 for a dropped one.  [GD]"""
    rows = [widths_of(one) for one in bands]
    return torch.tensor([row + [0] * (dim - len(row)) for row in rows])


def gated(maps: Maps, gate_XD: Tensor) -> Tensor:
    """encode diag(gate) decode^T.  [..., G, D -> ..., G, D, D]"""
    gate_XD = gate_XD.to(maps.encode_XDD.dtype)
    return (maps.encode_XDD * gate_XD[..., None, :]) @ maps.decode_XDD.mT


def rank_gate(ranks_X: Tensor, dim: int) -> Tensor:
    """True at the first `ranks` of `dim` columns.  [X -> XD]"""
    return torch.arange(dim, device=ranks_X.device) < ranks_X[..., None]
