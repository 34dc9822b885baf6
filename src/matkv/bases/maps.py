"""Pairs of maps between full width and ordered coordinates.

    z = x encode[:, :r]        x' = z decode[:, :r]^T

Any prefix of columns is usable. For an orthogonal basis both maps are that basis, and at full width
x' = x.

Shapes: G KV head, D head dim, X matrices: the KV heads of a layer, or of many in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from matkv.bases.quantizer import Quantizer


@dataclass(frozen=True)
class Maps:
    """`encode` and `decode` in fp32; the same tensor when orthogonal."""

    encode_XDD: Tensor
    decode_XDD: Tensor

    @classmethod
    def orthogonal(cls, basis_XDD: Tensor) -> Maps:
        return cls(basis_XDD, basis_XDD)

    @property
    def is_orthogonal(self) -> bool:
        return self.decode_XDD is self.encode_XDD

    def changed(self, change: Callable[[Tensor], Tensor]) -> Maps:
        """Both maps changed alike; orthogonal ones stay the same tensor."""
        encode_XDD = change(self.encode_XDD)
        return Maps(encode_XDD, encode_XDD if self.is_orthogonal else change(self.decode_XDD))


@dataclass(frozen=True)
class SideBases:
    """One side of one layer: its maps and the share of energy in each of their columns [GD].

    `quantizer` makes codes of the columns, where one was fitted to these maps.
    """

    maps: Maps
    energy_GD: Tensor
    quantizer: Quantizer | None = None
