"""Decoding on the CPU: torch's flash attention, a call per bucket, the context split over threads.

Shapes: B batch, G KV head, N heads of one bucket, X query head of a KV head, T cached token,
S split of the context, C row columns, M view columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matkv.attention.parts import even_lse, flash
from matkv.latents.layer import Bucket, LayerProjection

# A thread gets at least this many tokens: splitting fewer costs more than it saves.
MIN_SPLIT = 1024


def decode(
    query_BGXM: Tensor,
    rows: Sequence[Tensor],
    projection: LayerProjection,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one query position over all rows, [BNTC] per bucket.  [BGXM -> BGXM, BGX]

    `mask` is additive, [B|1 1 1 T], or None when every token is seen. The second result is the log
    of the weights' sum, in fp32.
    """
    X, M = query_BGXM.shape[2:]
    if X % 2 and query_BGXM.dtype == torch.bfloat16:
        # oneDNN multiplies an even number of bf16 rows faster, two in half the time of one.
        query_BGXM = torch.cat((query_BGXM, query_BGXM[:, :, :1]), dim=2)
    if len(rows) == 1 and projection.buckets[0].row_width:
        out_BGXM, lse_BGX = _decode_split(query_BGXM, rows[0], mask, scaling)
        return out_BGXM[:, :, :X], lse_BGX[:, :, :X]
    out_BGXM = query_BGXM.new_zeros(query_BGXM.shape)
    lse_BGX = query_BGXM.new_empty(query_BGXM.shape[:3], dtype=torch.float32)
    for bucket, rows_BNTC in zip(projection.buckets, rows, strict=True):
        if bucket.row_width == 0:
            lse_BGX[:, bucket.heads] = even_lse(mask, 1, rows_BNTC.shape[2], query_BGXM)
            continue
        width = _fast_width(bucket, M)
        query_BNXM = query_BGXM[:, bucket.heads, :, :width]
        out_BNXM, lse_BNX = _decode_split(query_BNXM, rows_BNTC, mask, scaling)
        out_BGXM[:, bucket.heads, :, M - width :] = out_BNXM
        lse_BGX[:, bucket.heads] = lse_BNX
    return out_BGXM[:, :, :X], lse_BGX[:, :, :X]


def _decode_split(
    query_BNXM: Tensor, rows_BNTC: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """One bucket, in parts where it has fewer sequences and heads than there are threads."""
    B, N, X, M = query_BNXM.shape
    tokens = rows_BNTC.shape[2]
    threads = _threads()
    splits = min(threads // (B * N), tokens // MIN_SPLIT)
    if splits < 2:
        return _flash(query_BNXM, rows_BNTC, mask, scaling)
    # Sequences and heads become one axis, so that the parts of a context are a view of its rows.
    query_YXM = query_BNXM.reshape(B * N, 1, X, M)
    rows_YTC = rows_BNTC.flatten(0, 1)
    if mask is not None and B > 1:
        mask = mask.expand(B, N, 1, tokens).reshape(B * N, 1, 1, tokens)
    end, parts = tokens - tokens % splits, []
    for span, pieces in ((slice(0, end), splits), (slice(end, tokens), 1)):
        if span.start == span.stop:
            continue
        rows_YSTC = rows_YTC[:, span].unflatten(1, (pieces, -1))
        piece = None if mask is None else mask[..., span].unflatten(3, (pieces, -1)).squeeze(1)
        piece = None if piece is None else piece.transpose(1, 2)
        parts.append(_flash(query_YXM.expand(-1, pieces, -1, -1), rows_YSTC, piece, scaling))
    out_YSXM, lse_YSX = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    weights_YSX = lse_YSX.softmax(dim=1).to(out_YSXM.dtype)
    out_YXM = (weights_YSX[..., None] * out_YSXM).sum(1)
    return out_YXM.view(B, N, X, M), lse_YSX.logsumexp(1).view(B, N, X)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    return torch.get_num_threads()


def _flash(
    query_BNXM: Tensor, rows_BNTC: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    width = query_BNXM.shape[-1]
    key_BNTM, value_BNTM = rows_BNTC[..., :width], rows_BNTC[..., -width:]
    out_BNXM, lse_BNX = flash(query_BNXM, key_BNTM, value_BNTM, attn_mask=mask, scale=scaling)
    return out_BNXM, lse_BNX


def _fast_width(bucket: Bucket, most: int) -> int:
    """View columns: the bucket's, or a few more.

    oneDNN's bf16 products take twice the time on views of just half a row of 64 or 128 columns.
    """
    is_slow = bucket.row_width in (64, 128) and 2 * bucket.width == bucket.row_width
    return min(bucket.width + 8, most) if is_slow else bucket.width
