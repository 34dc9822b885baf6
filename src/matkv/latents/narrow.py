"""Rows of one projection turned into rows of another of the same bases, at fewer bytes.

Shapes: B batch, G KV head, N heads of one bucket, T token, D head dim, F = 2 D, [key | value],
S side, C row columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matkv.errors import CacheError
from matkv.latents.layer import LayerProjection


@torch.no_grad()
def narrowed(
    rows: list[Tensor], old: LayerProjection, new: LayerProjection, dtype: torch.dtype
) -> list[Tensor]:
    """What a cache of `new` would hold of the same tokens, up to a second rounding of their codes.

    Columns that both keep at one width keep their codes. `dtype` is that of columns without codes.

    Raises:
        CacheError: the bases differ.
    """
    if old.source != new.source:
        raise CacheError("the cache holds tokens of other bases: reset() it or use a new one")
    z_BGTF, gain_BGTS = _coordinates(rows, old)
    z_BGTF, gain_BGTS = new.sort(z_BGTF), new.sort(gain_BGTS)
    if new.coder is None:
        return _plain(z_BGTF, new, dtype)
    y_BGTF = z_BGTF / new.coder.scale.float()[:, None]
    # Tokens without gains, of heads without codes, get those of what is left of them.
    gains_BGTS = torch.where(gain_BGTS > 0, gain_BGTS, new.coder.gains_of(y_BGTF))
    parts = [new.coder.rows(y_BGTF, b.heads, dtype, gains_BGTS) for b in new.buckets]
    return [part for pair in parts for part in pair]


def _coordinates(rows: list[Tensor], old: LayerProjection) -> tuple[Tensor, Tensor]:
    """Latents of all columns, zero where none is kept, and gains, in the model's order of heads.

    [BGTF], [BGTS]
    """
    D, ranks = old.head_dim, old.ranks.tolist()
    zs, gains = [], []
    for index, (bucket, latents_BNTC) in enumerate(
        zip(old.buckets, old.latents(rows), strict=True)
    ):
        B, N, T, _ = latents_BNTC.shape
        z_BNTF = latents_BNTC.new_zeros(B, N, T, 2 * D, dtype=torch.float32)
        for n, (key, value) in enumerate(ranks[bucket.heads]):
            z_BNTF[:, n, :, :key] = latents_BNTC[:, n, :, :key]
            z_BNTF[:, n, :, D : D + value] = latents_BNTC[:, n, :, key : key + value]
        if old.coder is None:
            gains.append(z_BNTF.new_zeros(B, N, T, 2, dtype=torch.uint8))
        else:
            z_BNTF *= (old.coder.step * old.coder.scale)[bucket.heads, None].float()
            gains.append(old.coder.held_gains(rows[2 * index : 2 * index + 2], bucket.heads))
        zs.append(z_BNTF)
    return old.unsort(torch.cat(zs, dim=1)), old.unsort(torch.cat(gains, dim=1))


def _plain(z_BGTF: Tensor, new: LayerProjection, dtype: torch.dtype) -> list[Tensor]:
    """Rows of columns without codes."""
    D, ranks, rows = new.head_dim, new.ranks.tolist(), []
    for bucket in new.buckets:
        heads = [
            torch.cat((z_BGTF[:, g, :, :key], z_BGTF[:, g, :, D : D + value]), dim=-1)
            for g, (key, value) in zip(
                range(bucket.heads.start, bucket.heads.stop), ranks[bucket.heads], strict=True
            )
        ]
        rows.append(torch.stack(heads, dim=1).to(dtype))
    return rows
