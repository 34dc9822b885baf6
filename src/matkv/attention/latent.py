"""Attention computed on latents: keys and values are never rebuilt at full width.

    score = (q decode_key[:, :r]) · z_key · scaling
    out   = (softmax(score) · z_value) decode_value[:, :r]^T

All of it by torch's fused attention on overlapping views of the rows, or by a kernel of our own for
one query. Tokens kept exact are a second part (exact.py), put together with the latents by
log-sum-exp.

Shapes: B batch, H query head, G KV head, N heads of one bucket, J query heads of a KV head
(H = G J), Q query position, X = J Q, T token, D head dim, M = max(R_key, R_value), C row columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from matkv.attention.exact import attend_exact
from matkv.attention.fixed import attend_fixed, fixed_masks
from matkv.attention.kernels import cpu, native
from matkv.attention.masks import additive, causal_bias, far_mask
from matkv.attention.parts import attend_part, even_lse, flows, merge
from matkv.errors import UnsupportedModelError
from matkv.latents import compiled
from matkv.latents.latents import Exact, Fixed, Latents
from matkv.latents.layer import LayerProjection, per_head
from matkv.latents.native import DTYPES

# Numbers of latents that are made from codes at a time, and the fewest tokens of them.
CACHED_NUMBERS, LEAST_STRETCH = 1 << 19, 64


def attend(
    latents: Latents,
    query_BHQD: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention output of every query head.  [BHQD -> BHQD]

    `mask` [B|1, 1, Q, T] is boolean (True attends) or additive, and may let a query see later
    tokens; None means causal, with the last query at the last token.

    Raises:
        UnsupportedModelError: the mask differs between heads, as a position bias does.
    """
    if latents.has_room and mask is not None:
        mask = mask[..., : latents.tokens]
    _check_mask(mask, query_BHQD.shape[2], latents.tokens)
    if latents.fixed is not None:
        return _attend_fixed(latents, latents.fixed, query_BHQD, mask, scaling, dropout)
    if latents.exact is not None:
        return _attend_both(latents, latents.exact, query_BHQD, mask, scaling, dropout)
    mask = None if mask is None else additive(mask, latents.rows[0].dtype)
    out_BHQD, _ = _attend_rows(latents, query_BHQD, mask, scaling, dropout, _sdpa)
    return out_BHQD


def attend_part_of(
    latents: Latents, query_BHQD: Tensor, mask: Tensor | None, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """`attend` over rows that are a part of the tokens, and the log of the weights' sum.

    No exact ones are read, see `parts.merge`. [BHQD -> BHQD, BHQ]
    """
    mask = None if mask is None else additive(mask, latents.rows[0].dtype)
    out_BHQD, lse_BGX = _attend_rows(latents, query_BHQD, mask, scaling, 0.0, attend_part)
    return out_BHQD, latents.projection.leave(lse_BGX, query_BHQD.shape[2])


def _attend_both(
    latents: Latents,
    exact: Exact,
    query_BHQD: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Exact tokens, and the latents of those between for the queries that come after any."""
    near_BHQD, lse_near_BHQ = attend_exact(
        exact, query_BHQD, mask, scaling=scaling, dropout=dropout
    )
    queries, rows = query_BHQD.shape[2], latents.rows[0].shape[2]
    if rows == 0:
        return near_BHQD
    # The last query reads all rows, each one before it a row less: the first ones none. But where
    # nothing is recent, a mask may let it see later ones.
    early = max(0, queries - rows) if mask is None or exact.reach else 0
    near = near_BHQD, lse_near_BHQ
    if early:
        query_BHQD = query_BHQD[:, :, early:]
        near = near_BHQD[:, :, early:], lse_near_BHQ[:, :, early:]
    if mask is not None or exact.is_padded:
        mask = far_mask(exact, mask, queries - early, rows, latents.rows[0].dtype)
    far_BHQD, lse_BGX = _attend_rows(latents, query_BHQD, mask, scaling, dropout, attend_part)
    lse_far_BHQ = latents.projection.leave(lse_BGX, queries - early)
    merged_BHQD = merge(far_BHQD, lse_far_BHQ, *near)
    return torch.cat((near_BHQD[:, :, :early], merged_BHQD), dim=2) if early else merged_BHQD


def _attend_fixed(
    latents: Latents,
    fixed: Fixed,
    query_BHQD: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Exact tokens and latents in shapes that never change."""
    queries, rows = query_BHQD.shape[2], latents.rows[0]
    near_bias, far_bias = fixed_masks(fixed, mask, rows.shape[2], query_BHQD.dtype)
    columns = fixed.columns_BGCF.shape[2]
    if columns == 0:
        return _attend_rows(latents, query_BHQD, far_bias, scaling, dropout, _sdpa)[0]
    near = attend_fixed(fixed, query_BHQD, near_bias, scaling=scaling, dropout=dropout)
    if rows.shape[2] == 0:
        return near[0]
    far_BHQD, lse_BGX = _attend_rows(latents, query_BHQD, far_bias, scaling, dropout, attend_part)
    return merge(far_BHQD, latents.projection.leave(lse_BGX, queries), *near)


def _attend_rows(
    latents: Latents,
    query_BHQD: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    fused: Fused,
) -> tuple[Tensor, Tensor]:
    """Attention over the rows, and the log of the weights' sum where `fused` tells it.

    The second is in sorted order; `mask` is additive.  [BHQD -> BHQD, BGX]
    """
    projection, rows, queries = latents.projection, latents.rows, query_BHQD.shape[2]
    query_BGXM = per_head(projection.enter(query_BHQD), projection.query).to(rows[0].dtype)
    decode = _decoder(query_BGXM, latents) if queries == 1 and not dropout else None
    if decode is not None:
        out_BGXM, lse_BGX = decode(query_BGXM, rows, projection, mask, scaling)
    else:
        fused = partial(fused, scaling=scaling, dropout=dropout)
        out_BGXM, lse_BGX = _attend_fused(
            projection, projection.latents(rows), query_BGXM, queries, mask, fused
        )
    out_BHQD = projection.leave(per_head(out_BGXM, projection.output), queries)
    return out_BHQD.to(query_BHQD.dtype), lse_BGX


def _decode_stretches(
    query_BGXM: Tensor,
    rows: list[Tensor],
    projection: LayerProjection,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`cpu.decode` of rows whose codes are turned into latents a stretch of tokens at a time."""
    tokens, stretch = rows[0].shape[2], _stretch(query_BGXM, projection)
    out_BGXM, lse_BGX = None, None
    for first in range(0, tokens, stretch):
        span = slice(first, first + stretch)
        part = rows if stretch >= tokens else [one[:, :, span] for one in rows]
        seen = mask if mask is None else mask[..., span]
        out, lse = cpu.decode(query_BGXM, projection.latents(part), projection, seen, scaling)
        if out_BGXM is None or lse_BGX is None:
            out_BGXM, lse_BGX = out, lse
        else:
            out_BGXM = merge(out, lse, out_BGXM, lse_BGX)
            lse_BGX = torch.logaddexp(lse, lse_BGX)
    assert out_BGXM is not None and lse_BGX is not None
    return out_BGXM, lse_BGX


def _stretch(query_BGXM: Tensor, projection: LayerProjection) -> int:
    """Tokens whose latents are made from codes at a time: as many as stay in a CPU's caches."""
    widest = max(bucket.row_width for bucket in projection.buckets)
    heads = max(bucket.heads.stop - bucket.heads.start for bucket in projection.buckets)
    numbers: int = query_BGXM.shape[0] * heads * widest
    return max(LEAST_STRETCH, CACHED_NUMBERS // max(1, numbers))


Decode = Callable[
    [Tensor, list[Tensor], LayerProjection, Tensor | None, float], tuple[Tensor, Tensor]
]
Fused = Callable[..., tuple[Tensor, Tensor]]


def _decoder(query_BGXM: Tensor, latents: Latents) -> Decode | None:
    """The device's fast path for one query position; none where gradients flow."""
    if flows(query_BGXM, *latents.rows):
        return None
    has_codes = latents.projection.coder is not None
    if query_BGXM.device.type == "cuda":
        # triton comes with torch where there is CUDA
        from matkv.attention.kernels import gpu, gpu_codes

        return gpu_codes.decode if has_codes else gpu.decode
    if query_BGXM.device.type != "cpu":
        return None
    if query_BGXM.dtype in DTYPES and not torch.compiler.is_compiling():
        # In fp32 without codes there is nothing to convert, and torch is faster.
        is_ours = has_codes or query_BGXM.dtype != torch.float32
        if is_ours and compiled.kernel() is not None:
            return native.decode
    return _decode_stretches if has_codes else cpu.decode


def _attend_fused(
    projection: LayerProjection,
    rows: list[Tensor],
    query_BGXM: Tensor,
    queries: int,
    mask: Tensor | None,
    fused: Fused,
) -> tuple[Tensor, Tensor]:
    """Every bucket through a fused attention.  [-> BGXM, BGX]"""
    M, tokens = query_BGXM.shape[3], rows[0].shape[2]
    is_causal = mask is None and queries == tokens and queries > 1
    if mask is None and not is_causal and queries > 1:
        mask = causal_bias(queries, tokens, query_BGXM)
    # One call per query head of a group copies neither keys, values nor mask; with one query
    # position the heads are positions of one call.
    step = queries if queries > 1 else query_BGXM.shape[2]
    out_BGXM = query_BGXM.new_zeros(query_BGXM.shape)
    lse_BGX = query_BGXM.new_zeros(query_BGXM.shape[:3], dtype=torch.float32)
    for bucket, rows_BNTC in zip(projection.buckets, rows, strict=True):
        if bucket.row_width == 0:
            even = even_lse(mask, queries, tokens, query_BGXM)
            lse_BGX[:, bucket.heads] = even.repeat(1, 1, query_BGXM.shape[2] // queries)
            continue
        width = bucket.width
        key_BNTM, value_BNTM = rows_BNTC[..., :width], rows_BNTC[..., -width:]
        query_BNXM = query_BGXM[:, bucket.heads, :, :width]
        parts = [
            fused(part, key_BNTM, value_BNTM, mask, is_causal=is_causal)
            for part in query_BNXM.split(step, dim=2)
        ]
        outs, sums = zip(*parts, strict=True)
        out_BGXM[:, bucket.heads, :, M - width :] = torch.cat(outs, dim=2)
        lse_BGX[:, bucket.heads] = torch.cat(sums, dim=2)
    return out_BGXM, lse_BGX


def _sdpa(
    query_BNQM: Tensor,
    key_BNTM: Tensor,
    value_BNTM: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    is_causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """torch's fused attention, which does not tell the log of the weights' sum: zeros."""
    out_BNQM = F.scaled_dot_product_attention(
        query_BNQM,
        key_BNTM,
        value_BNTM,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
    )
    return out_BNQM, out_BNQM.new_zeros(out_BNQM.shape[:3])


def _check_mask(mask: Tensor | None, Q: int, tokens: int) -> None:
    if mask is None:
        return
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (Q, tokens):
        raise UnsupportedModelError(
            f"attention mask of shape {tuple(mask.shape)}; latent attention takes "
            f"[batch, 1, {Q}, {tokens}], one mask for all heads"
        )
