"""The part of attention that is read at full width: the first tokens and the last ones.

A query reads its own token and the `recent` before it exactly, and the first `sink` of its
sequence. All others it reads as latents, see `matkv.attention`, which puts the two together.

Shapes: B batch, H query head, G KV head, J query heads of a KV head (H = G J), Q query, T token,
S sink token, K recent token, C both of these, N block of queries, P query of a block, X = B N,
D head dim, F = 2 D, [key | value].
"""

from __future__ import annotations

import torch
from torch import Tensor

from matkv.attention.masks import look_ahead, near_mask
from matkv.attention.parts import attend_part
from matkv.latents.latents import Exact

# Queries that share one stretch of recent tokens: more compute what their mask hides, fewer make
# more blocks.
BLOCK = 64


def attend_exact(
    exact: Exact,
    query_BHQD: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of the last Q tokens over the exact ones, and the log of the weights' sum.

    [BHQD -> BHQD, BHQ]. `mask` is that of all tokens, [B|1, 1, Q, T], None if it is causal.
    Tokens after a query that it lets see are read exactly.
    """
    Q = query_BHQD.shape[2]
    heads, dtype = exact.recent_BGKF.shape[1], exact.recent_BGKF.dtype
    query_BGJQD = query_BHQD.to(dtype).unflatten(1, (heads, -1))
    is_plain = mask is None and not exact.is_padded
    ahead = look_ahead(mask, exact.tokens - Q) if exact.reach else 0
    block = max(BLOCK, exact.reach // 2)
    # From `begin` on all blocks see the same pattern of columns, unless a mask says otherwise.
    begin = min(Q, max(0, exact.sink + exact.reach - 1 - (exact.tokens - Q)))
    begin += (Q - begin) % block if exact.reach else Q - begin
    ends = [begin] if is_plain else list(range(begin, Q + 1, block))
    parts, start = [], 0
    for end in ends:
        if start < end:
            queries = slice(start, end)
            parts.append(_one_block(exact, query_BGJQD, mask, queries, ahead, scaling, dropout))
        start = end
    if start < Q:
        parts.append(_equal_blocks(exact, query_BGJQD[..., start:, :], block, scaling, dropout))
    out_BGJQD, lse_BGJQ = (
        ones[0] if len(ones) == 1 else torch.cat(ones, dim=3) for ones in zip(*parts, strict=True)
    )
    return out_BGJQD.flatten(1, 2).to(query_BHQD.dtype), lse_BGJQ.flatten(1, 2)


def _one_block(
    exact: Exact,
    query_BGJQD: Tensor,
    mask: Tensor | None,
    queries: slice,
    ahead: int,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Some queries with whatever columns they need.  [-> BGJPD, BGJP]"""
    before = exact.tokens - query_BGJQD.shape[3]
    low = max(exact.first, before + queries.start - exact.reach + 1 - exact.gaps)
    high = min(exact.tokens, before + queries.stop + ahead)
    sink_BGSF, bias = exact.sink_BGSF, None
    if mask is None and not exact.is_padded and queries.stop - queries.start == 1:
        # One query sees all its columns: decoding needs no mask.
        sink_BGSF, low = sink_BGSF[:, :, : exact.tokens], max(low, exact.sink)
    else:
        query_P = torch.arange(queries.start, queries.stop, device=query_BGJQD.device) + before
        given = None if mask is None else mask[:, :, queries]
        stretch = slice(low, high if exact.reach else low)
        bias = near_mask(exact, given, query_P, stretch, query_BGJQD.dtype)
    columns_BGCF = sink_BGSF
    if exact.reach:
        columns_BGCF = exact.recent_BGKF[:, :, low - exact.first : high - exact.first]
        if exact.sink:
            columns_BGCF = torch.cat((sink_BGSF, columns_BGCF), dim=2)
    return attend_columns(query_BGJQD[..., queries, :], columns_BGCF, bias, scaling, dropout)


def _equal_blocks(
    exact: Exact, query_BGJQD: Tensor, block: int, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """The last queries, a multiple of `block`, in one call: every block sees the same columns."""
    B, count = query_BGJQD.shape[0], query_BGJQD.shape[3] // block
    begin, width = exact.tokens - count * block, block + exact.reach - 1
    low = begin - exact.reach + 1
    stretches_BGNFC = exact.recent_BGKF[:, :, low - exact.first :].unfold(2, width, block)
    columns_XGCF = stretches_BGNFC.permute(0, 2, 1, 4, 3).flatten(0, 1)
    if exact.sink:
        sink_BNGSF = exact.sink_BGSF[:, None].expand(-1, count, -1, -1, -1)
        columns_XGCF = torch.cat((sink_BNGSF.flatten(0, 1), columns_XGCF), dim=2)
    query_P = torch.arange(begin, begin + block, device=query_BGJQD.device)
    bias = near_mask(exact, None, query_P, slice(low, low + width), query_BGJQD.dtype)
    query_XGJPD = query_BGJQD.unflatten(3, (count, block)).movedim(3, 1).flatten(0, 1)
    out_XGJPD, lse_XGJP = attend_columns(query_XGJPD, columns_XGCF, bias, scaling, dropout)
    out_BNGJPD, lse_BNGJP = (x.unflatten(0, (B, count)) for x in (out_XGJPD, lse_XGJP))
    return out_BNGJPD.movedim(1, 3).flatten(3, 4), lse_BNGJP.movedim(1, 3).flatten(3, 4)


def attend_columns(
    query_BGJPD: Tensor, columns_BGCF: Tensor, bias: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention of grouped queries over tokens at full width.  [-> BGJPD, BGJP]

    `bias` [B|1 1 P C] is added to scores.
    """
    J, P, D = query_BGJPD.shape[2:]
    if bias is not None:
        bias = bias[:, :, None].expand(-1, -1, J, -1, -1).flatten(2, 3)
    out_BGXD, lse_BGX = attend_part(
        query_BGJPD.flatten(2, 3),
        columns_BGCF[..., :D],
        columns_BGCF[..., D:],
        bias,
        scaling=scaling,
        dropout=dropout,
    )
    return out_BGXD.unflatten(2, (J, P)), lse_BGX.unflatten(2, (J, P))
