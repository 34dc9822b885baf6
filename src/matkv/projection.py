"""Pairs of maps between full width and ordered coordinates.

    z = x encode[:, :r]        x' = z decode[:, :r]^T        encode decode^T = I

Any prefix of columns is usable. For an orthogonal basis both maps are that basis.

Shapes: B batch, G KV head, T token, D head dim, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from matkv.errors import RankError


def truncate(x_BGTD: Tensor, basis_GDD: Tensor, rank: int) -> Tensor:
    """Keep the `rank` leading coordinates of `x` in `basis`.

    z = x U[:, :rank]    [BGTD, GDD -> BGTR]

    Raises:
        RankError: `rank` is outside 0..D.
    """
    if not 0 <= rank <= basis_GDD.shape[-1]:
        raise RankError(f"rank {rank} must be in 0..{basis_GDD.shape[-1]}")
    return x_BGTD @ basis_GDD[..., :rank]


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
