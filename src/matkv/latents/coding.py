"""Codes of a layer's latents: made for the cache, and turned back for attention.

Shapes: B batch, G KV head, N heads of one bucket, T token, D head dim, F = 2 D, [key | value],
S side, P columns in the model's dtype, Y bytes, C row columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from matkv.bases.maps import Maps
from matkv.bases.quantizer import (
    GAIN_STEPS,
    GAIN_ZERO,
    Quantizer,
    coded,
    gain_codes,
    gains,
    levels_of,
)
from matkv.codes import CODED, GAIN_BYTES, WIDTHS, Bands, code_bytes, has_codes, widths_of
from matkv.latents.packing import pack, packed_size, unpack_into
from matkv.ranks import SIDES, LayerBands, RankTable, Side


@dataclass(frozen=True)
class SideCoding:
    """The bands of one layer's heads on one side, and how their columns are quantized."""

    bands: LayerBands
    quantizer: Quantizer

    def picked(self, order: list[int]) -> SideCoding:
        """The same of heads in another order."""
        quantizer = self.quantizer
        return SideCoding(
            tuple(self.bands[head] for head in order),
            Quantizer(
                quantizer.scale_GD[order],
                quantizer.step_WGD[:, order],
                quantizer.error_WGD[:, order],
            ),
        )

    def steps(self) -> Tensor:
        """Every column's step in units of its scale, 1 where it has no code.  [GD]"""
        step_GD = torch.ones_like(self.quantizer.scale_GD)
        for head, bands in enumerate(self.bands):
            for column, width in enumerate(widths_of(bands)):
                if width in CODED:
                    step_GD[head, column] = self.quantizer.step_WGD[
                        CODED.index(width), head, column
                    ]
        return step_GD

    def units(self) -> Tensor:
        """What one step of every column, or its number, is worth.  [GD]"""
        return self.steps() * self.quantizer.scale_GD


def layer_coding(
    table: RankTable, layer: int, quantizer: Callable[[int, Side], Quantizer]
) -> tuple[SideCoding, SideCoding] | None:
    """The codes of a layer's keys and values; None where the table keeps none."""
    if not table.is_coded(layer):
        return None
    key, value = (SideCoding(table.bands(layer, side), quantizer(layer, side)) for side in SIDES)
    return key, value


class Coder(nn.Module):
    """Turns the states of one layer into rows of numbers and of codes, and these into latents.

    Heads are in sorted order. `encode` [G S D D] gives coordinates of unit variance, of all
    columns, because the gain is theirs; `scale` [G F] is their size, and `step` [G F] is in units
    of it. Latents are in units of a step: the maps of queries and outputs take the rest.

    A bucket's heads have the same bands. Its rows are two tensors: [B N T P], the columns without
    codes, keys' and then values', and [B N T Y] of bytes: the gains of key and of value, where
    these have codes, then the bands of the key and those of the value. `layout` says where, for
    kernels: see `row_layout`, of every head in turn.
    """

    # A gain is two to the power of its byte less the first, over the second.
    gain_scale = GAIN_ZERO, GAIN_STEPS

    encode: Tensor
    scale: Tensor
    step: Tensor

    def __init__(self, key: Maps, value: Maps, key_coding: SideCoding, value_coding: SideCoding):
        super().__init__()
        sides = ((key, key_coding), (value, value_coding))
        D = key_coding.quantizer.scale_GD.shape[1]
        encodes, scales, steps = [], [], []
        for maps, coding in sides:
            scale_GD = coding.quantizer.scale_GD
            encodes.append(maps.encode_XDD / scale_GD[:, None])
            scales.append(scale_GD)
            steps.append(coding.steps())
        self.bands = list(zip(key_coding.bands, value_coding.bands, strict=True))
        self.head_dim = D
        self.register_buffer("encode", torch.stack(encodes, dim=1), persistent=False)
        self.register_buffer("scale", torch.cat(scales, dim=1), persistent=False)
        self.register_buffer("step", torch.cat(steps, dim=1), persistent=False)

    def coordinates(self, states_BGTF: Tensor) -> Tensor:
        """Coordinates of unit variance, in fp32 whatever the states are, without gradients.

        [BGTF]
        """
        with torch.no_grad(), torch.autocast(states_BGTF.device.type, enabled=False):
            sides = states_BGTF.float().split(self.head_dim, dim=-1)
            maps = self.encode.float().unbind(1)
            parts = [x_BGTD @ map_GDD for x_BGTD, map_GDD in zip(sides, maps, strict=True)]
            return torch.cat(parts, dim=-1)

    def gains_of(self, y_BGTF: Tensor) -> Tensor:
        """The gains of key and value, as bytes.  [BGTS]"""
        sides = y_BGTF.split(self.head_dim, dim=-1)
        return torch.cat([gain_codes(side_BGTD) for side_BGTD in sides], dim=-1)

    def rows(
        self, y_BGTF: Tensor, heads: slice, dtype: torch.dtype, gain_BGTS: Tensor | None = None
    ) -> list[Tensor]:
        """One bucket's rows of tokens; their gains, of key and value, are those of `y` or given."""
        bands, D = self.bands[heads.start], self.head_dim
        y_BNTF, step_NF = y_BGTF[:, heads], self.step[heads].float()
        plain = [y_BNTF[..., :0]]
        heading: list[Tensor] = []
        packed = [y_BNTF[..., :0].to(torch.uint8)]
        for side, one in enumerate(bands):
            part = slice(side * D, (side + 1) * D)
            y_BNTD, step_ND = y_BNTF[..., part], step_NF[:, part]
            plain.append(y_BNTD[..., : one[0]])
            if not has_codes(one):
                continue
            given = None if gain_BGTS is None else gain_BGTS[:, heads, :, side : side + 1]
            heading.append(gain_codes(y_BNTD) if given is None else given)
            unit_BNTD = y_BNTD / gains(heading[-1])
            for width, columns in _spans(one):
                codes = coded(unit_BNTD[..., columns], step_ND[:, None, columns], width)
                codes = (codes - levels_of(width)[0]).to(torch.uint8)
                packed.append(pack(codes, width))
        return [torch.cat(plain, dim=-1).to(dtype), torch.cat((*heading, *packed), dim=-1)]

    def latents(self, rows: list[Tensor], heads: slice) -> Tensor:
        """One bucket's latents in units of a step, from its rows.  [BNTP, BNTY -> BNTC]"""
        bands, (plain_BNTP, bytes_BNTY) = self.bands[heads.start], rows
        out_BNTC = plain_BNTP.new_empty(*plain_BNTP.shape[:3], sum(map(sum, bands)))
        gain = sum(map(has_codes, bands))
        gain_BNTX = gains(bytes_BNTY[..., :gain], plain_BNTP.dtype)
        taken = column = place = 0
        for one in bands:
            out_BNTC[..., column : column + one[0]] = plain_BNTP[..., taken : taken + one[0]]
            taken += one[0]
            for width, columns in _spans(one):
                size = packed_size(columns.stop - columns.start, width)
                out = out_BNTC[..., column + columns.start : column + columns.stop]
                unpack_into(out, bytes_BNTY[..., gain : gain + size], width)
                out.add_(levels_of(width)[0] + 0.5)
                gain += size
            if has_codes(one):
                coded_columns = slice(column + one[0], column + sum(one))
                out_BNTC[..., coded_columns] *= gain_BNTX[..., place : place + 1]
                place += 1
            column += sum(one)
        return out_BNTC

    def held_gains(self, rows: list[Tensor], heads: slice) -> Tensor:
        """The gains in one bucket's rows, as bytes; 0 where a side has no codes.  [BNTS]"""
        bands, bytes_BNTY = self.bands[heads.start], rows[1]
        held = bytes_BNTY.new_zeros(*bytes_BNTY.shape[:3], len(bands))
        place = 0
        for side, one in enumerate(bands):
            if has_codes(one):
                held[..., side] = bytes_BNTY[..., place]
                place += 1
        return held


def row_sizes(bands: tuple[Bands, Bands]) -> tuple[int, int]:
    """P and Y of heads with these bands of key and value."""
    return sum(one[0] for one in bands), sum(map(code_bytes, bands))


def row_layout(bands: tuple[Bands, Bands]) -> list[tuple[int, ...]]:
    """Where a row has its key and its value, seven numbers each.

    The first of the columns without codes and their number; the byte of the gain, -1 where there is
    none, and the first byte of the bands; how many columns have 8, 4 and 2 bits.
    """
    column, gain, byte = 0, 0, GAIN_BYTES * sum(map(has_codes, bands))
    sides: list[tuple[int, ...]] = []
    for one in bands:
        gain_bytes = GAIN_BYTES * has_codes(one)
        sides.append((column, one[0], gain if gain_bytes else -1, byte, *one[1:]))
        column, gain = column + one[0], gain + gain_bytes
        byte += code_bytes(one) - gain_bytes
    return sides


def _spans(bands: Bands) -> list[tuple[int, slice]]:
    """The width of every band of codes that is not empty, and its columns."""
    ends = [sum(bands[: index + 1]) for index in range(len(WIDTHS))]
    spans = zip(CODED, pairwise(ends), strict=True)
    return [(width, slice(first, last)) for width, (first, last) in spans if first < last]
