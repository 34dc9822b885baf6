"""Pairs of maps between full width and ordered coordinates.

    z = x encode[:, :r]        x' = z decode[:, :r]^T

Any prefix of columns is usable. For an orthogonal basis both maps are that basis, and at full width
x' = x.

Shapes: G KV head, D head dim."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Maps:
    """One side of one layer: `encode` and `decode`, fp32; the same tensor when orthogonal."""

    encode_GDD: Tensor
    decode_GDD: Tensor

    @classmethod
    def orthogonal(cls, basis_GDD: Tensor) -> Maps:
        return cls(basis_GDD, basis_GDD)

    @property
    def is_orthogonal(self) -> bool:
        return self.decode_GDD is self.encode_GDD


@dataclass(frozen=True)
class SideBases:
    """One side of one layer: its maps and the share of energy in each of their columns [GD]."""

    maps: Maps
    energy_GD: Tensor
