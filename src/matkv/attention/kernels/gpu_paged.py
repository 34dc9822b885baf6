"""Decoding on a GPU where rows are in a server's pages: `native.attend_paged` by Triton.

The kernels are those of gpu.py and gpu_codes.py, which find tokens by a table of pages.

Shapes: B sequence, R range of tokens, T token of the step, H query head, G KV head, X query head of
a KV head, Q = 1, D head dim, M view columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from matkv.attention.kernels import gpu, gpu_codes
from matkv.attention.kernels.native import Reads
from matkv.attention.parts import merge
from matkv.latents.layer import LayerProjection, per_head
from matkv.latents.native import HEAD, Paged


def attend_paged(
    query_THD: Tensor,
    out_THD: Tensor,
    projection: LayerProjection,
    far: Reads,
    near: Reads | None = None,
    *,
    tokens_B: Tensor | None = None,
    longest: int,
    scaling: float,
) -> None:
    """`native.attend_paged` of sequences of at most `longest` tokens."""
    which = slice(None) if tokens_B is None else tokens_B
    query_BHQD = query_THD[which][:, :, None]
    dtype = far.paged.numbers_KNP.dtype
    query_BGXM = per_head(projection.enter(query_BHQD), projection.query).to(dtype)
    out_BGXM, lse_BGX = _far(query_BGXM, projection, far, longest, scaling)
    out_BHQD = projection.leave(per_head(out_BGXM, projection.output), 1)
    if near is not None:
        lse_BHQ = projection.leave(lse_BGX, 1)
        heads = projection.kv_heads
        out_BHQD = merge(out_BHQD, lse_BHQ, *_near(query_BHQD, heads, near, longest, scaling))
    out_THD[which] = out_BHQD[:, :, 0].to(out_THD.dtype)


def _far(
    query_BGXM: Tensor, projection: LayerProjection, reads: Reads, longest: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention over latents.  [BGXM, BGX]"""
    ranges_B2 = reads.ranges_BR2[:, 0].contiguous()
    paged = reads.paged
    context = gpu.Context(longest, None, reads.table_BX, ranges_B2, paged.tokens)
    numbers = _places(paged, 0)
    if projection.coder is not None:
        codes = _places(paged, 1)
        return gpu_codes.decode_in(context, query_BGXM, numbers, codes, projection, scaling)
    ranks, highest = projection.ranks, projection.highest_ranks
    return gpu.decode_in(context, query_BGXM, numbers, ranks, highest, scaling)


def _near(
    query_BHQD: Tensor, heads: int, reads: Reads, longest: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention over whole keys and values, every range as a sequence.  [BHQD, BHQ]"""
    paged, (B, R, _), D = reads.paged, reads.ranges_BR2.shape, query_BHQD.shape[3]
    query_BGXD = query_BHQD[:, :, 0].unflatten(1, (heads, -1)).to(paged.numbers_KNP.dtype)
    context = gpu.Context(
        longest, None, reads.table_BX.repeat_interleave(R, 0), reads.ranges_BR2.reshape(B * R, 2),
        paged.tokens,
    )  # fmt: skip
    query_YGXD = query_BGXD.repeat_interleave(R, 0)
    ranks = _whole_ranks(heads, D, query_BHQD.device)
    out_YGXD, lse_YGX = gpu.decode_in(
        context, query_YGXD, _places(paged, 0), ranks, (D, D), scaling
    )
    lse_BRH = lse_YGX.view(B, R, -1)
    share_BRH = lse_BRH.softmax(1)[..., None].to(out_YGXD.dtype)
    out_BHD = (share_BRH * out_YGXD.view(B, R, -1, D)).sum(1)
    return out_BHD[:, :, None], lse_BRH.logsumexp(1)[..., None]


def _places(paged: Paged, kind: int) -> tuple[int, ...]:
    """`gpu.places` of heads in pages, of numbers or of codes."""
    size = (paged.codes_KNY if kind else paged.numbers_KNP).element_size()
    found: list[int] = []
    for first in range(3 * kind, len(paged.heads), HEAD):
        address, page, token = paged.heads[first : first + 3]
        found += (address, page // size, token // size)
    return tuple(found)


@lru_cache
def _whole_ranks(heads: int, dim: int, device: torch.device) -> Tensor:
    return torch.full((heads, 2), dim, dtype=torch.int32, device=device)
