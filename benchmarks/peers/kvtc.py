"""KVTC's transform coding (arXiv 2511.01815), written from its paper and simulated.

    y = [k of all heads before rotary embedding], or [v of all heads]       z = (y - mean) U

U are the principal components of a layer's side, for all its heads at once. Every component gets 0,
2, 4 or 8 bits, those that make the summed squared error of all layers least, by the error measured
for the quantizer in use. Keys and values get half of the bytes each, for their errors have no unit
in common. The first 4 tokens and the last ones, 128 in the paper, stay exact and are paid for.

The context is read with the full cache and becomes codes afterwards. Keys are rebuilt before they
are attended to: the rotary embedding is taken off what the cache holds and put on again.

Not as in the paper: components of a layer, not of all layers together; matkv's own codes, static
steps and a gain of a byte a token and side, in place of its shifts and scales; no entropy coding,
which makes an archive smaller but not a cache that is attended to. Calibrated on training articles.

Shapes: B batch, G KV head, T token, D head dim, N = G D columns of all heads, E token seen in
calibration, R component that is kept, W width in bits: 8, 4, 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matkv.allocate.bits import Waterline
from matkv.allocate.config import Constraints
from matkv.allocate.noise import FITTED
from matkv.bases.gates import GatedProjection, Projected
from matkv.bases.maps import Maps
from matkv.bases.moments import ordered_basis
from matkv.bases.quantizer import Quantizer, fit
from matkv.codes import CODED, Bands
from matkv.errors import UnsupportedModelError
from matkv.hf.geometry import attention_modules, geometry_of
from matkv.hf.observe import observe
from matkv.hf.wrappers import decoder_of
from matkv.ranks import SIDES, Cell, Geometry, LayerShape, RankTable, Side

from .coded import Coded
from .ours import Exact

SINK = 4
RECENT = 128
STEP = 4  # columns of one width at least: a byte of the narrowest codes


class Rotary:
    """A model's rotary embedding, taken off keys of the slots 0 to T - 1 and put on again.

    Raises:
        UnsupportedModelError: the model has none that can be found, or sliding windows.
    """

    def __init__(self, model: Any) -> None:
        kind = type(attention_modules(model)[0])
        self.embedding: Any = getattr(decoder_of(model), "rotary_emb", None)
        self.apply: Any = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
        shapes = geometry_of(model.config).layers
        if (
            self.embedding is None
            or self.apply is None
            or not all(one.window is None for one in shapes)
        ):
            raise UnsupportedModelError(
                f"{kind.__name__}: keys before the rotary embedding are written for one embedding "
                "of the whole decoder, and layers without a sliding window"
            )

    def on(self, key_BGTD: Tensor) -> Tensor:
        return self._turned(key_BGTD, *self._angles(key_BGTD))

    def off(self, key_BGTD: Tensor) -> Tensor:
        cos_1TD, sin_1TD = self._angles(key_BGTD)
        size_1TD = cos_1TD.square() + sin_1TD.square()  # 1, but where contexts were extended
        return self._turned(key_BGTD, cos_1TD / size_1TD, -sin_1TD / size_1TD)

    def _angles(self, key_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        positions_1T = torch.arange(key_BGTD.shape[2], device=key_BGTD.device)[None]
        cos_1TD, sin_1TD = self.embedding(key_BGTD.float(), positions_1T)
        return cos_1TD, sin_1TD

    def _turned(self, key_BGTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
        turned: Tensor = self.apply(key_BGTD.float(), key_BGTD.float(), cos_1TD, sin_1TD)[1]
        return turned


def joined(x_BGTD: Tensor) -> Tensor:
    """All heads of a token side by side.  [BGTD -> BTN]"""
    return x_BGTD.transpose(1, 2).flatten(2)


def parted(y_BTN: Tensor, heads: int) -> Tensor:
    """Inverse of `joined`.  [BTN -> BGTD]"""
    x_BTGD: Tensor = y_BTN.unflatten(-1, (heads, -1))
    return x_BTGD.transpose(1, 2)


# ---- calibration


@dataclass(frozen=True)
class JointBasis:
    """One side of one layer: its mean, its components as one head of N columns, their quantizer."""

    mean_N: Tensor
    maps: Maps
    quantizer: Quantizer


class JointRecorder:
    """Sums the moments of one layer's joint keys and values, and keeps the first tokens' rows.

    The first tokens of a sequence are left out, as they are exact.
    """

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.tokens = 0
        self.sums: dict[Side, tuple[Tensor, Tensor]] = {}  # [N], [NN]
        self.rows: dict[Side, list[Tensor]] = {side: [] for side in SIDES}

    def __call__(self, _: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        kept = max(0, FITTED - self.tokens)
        for side, x_BGTD in zip(SIDES, (self.rotary.off(key_BGTD), value_BGTD), strict=True):
            y_EN = joined(x_BGTD)[:, SINK:].flatten(0, 1).float()
            sums = y_EN.sum(0), y_EN.T @ y_EN
            before = self.sums.get(side)
            self.sums[side] = sums if before is None else (before[0] + sums[0], before[1] + sums[1])
            self.rows[side].append(y_EN[:kept].cpu())
        self.tokens += len(y_EN)

    def basis(self, side: Side) -> JointBasis:
        mean_N, square_NN = (one.cpu().double() / self.tokens for one in self.sums[side])
        basis_1NN = ordered_basis((square_NN - torch.outer(mean_N, mean_N))[None])
        z_1EN = (torch.cat(self.rows[side]) - mean_N.float()) @ basis_1NN
        return JointBasis(mean_N.float(), Maps.orthogonal(basis_1NN), fit(z_1EN))


def joint_bases(model: Any, batches: Iterable[Tensor]) -> list[Mapping[Side, JointBasis]]:
    """The bases of every layer, from one pass over batches [BT] without padding.

    Raises:
        UnsupportedModelError: see `Rotary`.
    """
    rotary = Rotary(model)
    recorders = [JointRecorder(rotary) for _ in attention_modules(model)]
    observe(model, dict(enumerate(recorders)), batches)
    return [{side: recorder.basis(side) for side in SIDES} for recorder in recorders]


# ---- bits


def allocated(bases: list[Mapping[Side, JointBasis]], budget: float) -> RankTable:
    """The bits of every component within a budget; each layer counts as one head of N columns.

    Raises:
        BudgetError: the budget is outside (0, 1].
    """
    shapes = [LayerShape(kv_heads=1, head_dim=_columns(one["key"])) for one in bases]
    geometry = Geometry(query_heads=1, layers=tuple(shapes))
    bands: dict[Cell, Bands] = {}
    for side in SIDES:
        # What costs nothing to drop is dropped: all bytes go to this side.
        damage: dict[Cell, Tensor] = {
            (layer, its, 0): errors(one[its]) * (its == side)
            for layer, one in enumerate(bases)
            for its in SIDES
        }
        table = Waterline(geometry, damage, Constraints(step=STEP), CODED).table(budget / 2)
        bands |= {cell: table.bands(cell[0], side)[0] for cell in damage if cell[1] == side}
    return RankTable.banded(geometry, bands)


def errors(basis: JointBasis) -> Tensor:
    """Mean squared error of every component at 16, 8, 4, 2 and 0 bits.  [NW]"""
    none_1N = torch.zeros_like(basis.quantizer.scale_GD)
    dropped_1N = basis.quantizer.scale_GD.square()
    return torch.cat((none_1N, *basis.quantizer.error_WGD, dropped_1N)).T


def _columns(basis: JointBasis) -> int:
    return basis.maps.encode_XDD.shape[-1]


# ---- the method


class JointCodes(Projected):
    """One layer's keys and values through the codes of their joint components."""

    def __init__(
        self,
        coded: GatedProjection,
        means: tuple[Tensor, Tensor],
        rotary: Rotary,
        exact: Exact,
    ) -> None:
        super().__init__(exact.recent, exact.sink)
        self.coded, self.means, self.rotary = coded, means, rotary

    def changed(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they come out of the cache."""
        plain = self.rotary.off(key_BGTD), value_BGTD.float()
        centred = [
            (joined(x_BGTD) - mean_N)[:, None]
            for x_BGTD, mean_N in zip(plain, self.means, strict=True)
        ]
        key, value = (
            parted(y_B1TN[:, 0] + mean_N, key_BGTD.shape[1])
            for y_B1TN, mean_N in zip(self.coded.changed(*centred), self.means, strict=True)
        )
        return self.rotary.on(key).to(key_BGTD.dtype), value.to(value_BGTD.dtype)


class Kvtc(Coded):
    """Joint components at the bits that a budget allows."""

    def __init__(
        self, bases: list[Mapping[Side, JointBasis]], budget: float, *, recent: int = RECENT
    ) -> None:
        super().__init__(Exact(sink=SINK, recent=recent))
        self.bases, self.table = bases, allocated(bases, budget)

    def handlers(self, model: Any) -> Mapping[int, Projected]:
        def there(x: Tensor) -> Tensor:
            return x.to(model.device)

        rotary, found = Rotary(model), {}
        for layer, sides in enumerate(self.bases):
            coded = GatedProjection(
                {side: one.maps.changed(there) for side, one in sides.items()},
                quantizers={side: one.quantizer.changed(there) for side, one in sides.items()},
            )
            for side in SIDES:
                coded.code(side, self.table.bands(layer, side))
            means = there(sides["key"].mean_N), there(sides["value"].mean_N)
            found[layer] = JointCodes(coded, means, rotary, self.exact)
        return found

    def coded_nbytes(self, cache: Any) -> int:
        return self.table.bytes_per_token(cache.layers[0].keys.dtype)

    def fixed_nbytes(self, model: Any) -> int:
        """Kept components [NR], their scales and steps [R], and the mean of a side [N]."""
        numbers = sum(
            _columns(self.bases[layer][side]) * (rank + 1) + 2 * rank
            for layer, side, _, rank in self.table.compressed_ranks()
        )
        return numbers * int(model.dtype.itemsize)
