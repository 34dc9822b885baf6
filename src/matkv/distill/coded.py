"""Bands as a training draws them: levels that stand for tables, and states that pass through codes.

Shapes: B sequence, L table, X cells (layer, side, KV head), G KV head, T token, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from matkv.artifact.artifact import Artifact
from matkv.bases.gates import Projected, band_widths
from matkv.bases.maps import Maps
from matkv.bases.quantizer import Quantizer, requantized
from matkv.ranks import SIDES, RankTable, Side
from matkv.schedule import Axis

Place = tuple[int, Side]


def level_axes(artifact: Artifact, budgets: Sequence[float]) -> tuple[Axis, ...]:
    """One axis for every compressed layer, side and KV head; level k stands for the k-th budget."""
    return tuple(
        Axis(f"{layer}.{side}.{head}", len(budgets), 1)
        for layer, side, head, _ in RankTable.full(artifact.geometry).compressed_ranks()
    )


class Coding:
    """How keys and values are coded while their bases are learned.

    `widths[place]` [LGD] are those of every table, `moments[place]` [GDD] what the scales of the
    bases as they are now follow from; the steps stay those fitted to the bases at the start.
    """

    def __init__(
        self,
        tables: Sequence[RankTable],
        quantizers: Mapping[Place, Quantizer],
        moments: Mapping[Place, Tensor],
    ) -> None:
        self.quantizers, self.moments = dict(quantizers), dict(moments)
        self.widths = {
            (layer, side): torch.stack(
                [band_widths(table.bands(layer, side), one.scale_GD.shape[-1]) for table in tables]
            )
            for (layer, side), one in quantizers.items()
        }

    def widths_at(self, place: Place, levels_BG: Tensor) -> Tensor:
        """The width of every column at levels from 1 on.  [BGD]"""
        widths_LGD = self.widths[place].to(levels_BG.device)
        heads_G = torch.arange(levels_BG.shape[1], device=levels_BG.device)
        return widths_LGD[levels_BG - 1, heads_G]

    @torch.no_grad()
    def quantizer(self, place: Place, maps: Maps) -> Quantizer:
        """The quantizer of a side at the bases it has now."""
        encode_GDD = maps.encode_XDD
        quantizer = self.quantizers[place].changed(lambda x: x.to(encode_GDD.device))
        return quantizer.rescaled(self.moments[place].to(encode_GDD), encode_GDD)


class Recoded(Projected):
    """One layer's keys and values after a trip through codes, the bases with gradients.

    `sides[side]` holds its maps, its quantizer and the widths [BGD]; without any, states pass
    unchanged.
    """

    def __init__(self, recent: int = 0, sink: int = 0) -> None:
        super().__init__(recent, sink)
        self.sides: dict[Side, tuple[Maps, Quantizer, Tensor]] = {}

    def changed(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they come out of a cache in which no token is exact."""
        if not self.sides:
            return key_BGTD, value_BGTD
        key, value = (
            self._recoded(side, x_BGTD)
            for side, x_BGTD in zip(SIDES, (key_BGTD, value_BGTD), strict=True)
        )
        return key, value

    def _recoded(self, side: Side, x_BGTD: Tensor) -> Tensor:
        maps, quantizer, width_BGD = self.sides[side]
        with torch.autocast(x_BGTD.device.type, enabled=False):
            z_BGTD = x_BGTD.float() @ maps.encode_XDD
            back_BGTD = requantized(quantizer, z_BGTD, width_BGD)
            return (back_BGTD @ maps.decode_XDD.mT).to(x_BGTD.dtype)
