"""Decoding on the CPU by the compiled kernel, rows.c: one call for all sequences, heads and tokens.

`decode` reads the rows of matkv's own caches, `decode_paged` those in the pages of a server.

Shapes: B sequence, G KV head, N heads of one bucket, X query head of a KV head, T cached token,
C row columns, M view columns, P columns without codes, Y bytes, R range of tokens. In pages: X page
of a sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from matkv.latents.coding import Coder
from matkv.latents.compiled import kernel
from matkv.latents.layer import LayerProjection
from matkv.latents.native import DTYPES, Heads, Paged, fill, heads_of


class _Call(ctypes.Structure):
    """`struct call` of rows.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "lse", "heads", "mask")),
        *((name, ctypes.c_void_p) for name in ("table", "ranges", "gains", "parallel")),
        *((name, ctypes.c_int64) for name in ("B", "G", "X", "M", "dtype", "tokens")),
        *((name, ctypes.c_int64) for name in ("mask_stride", "table_stride", "block", "threads")),
        ("R", ctypes.c_int64),
        ("scaling", ctypes.c_double),
    )


@dataclass(frozen=True)
class Reads:
    """What one query of every sequence reads: tokens of some ranges of its own, in its pages.

    Token t of sequence b is at place t % N of page `table_BX[b, t // N]`. Of each pair in
    `ranges_BR2` the first token is read, and the last is not; ranges may be empty, and must not
    overlap. What is outside of them is not read, whatever it is. Both are int32.
    """

    table_BX: Tensor
    ranges_BR2: Tensor


def decode(
    query_BGXM: Tensor,
    rows: Sequence[Tensor],
    projection: LayerProjection,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`cpu.decode` of rows as the cache holds them: [BNTC], or with codes [BNTP] and [BNTY].

    [BGXM -> BGXM, BGX]
    """
    rows = [row if row.stride(3) == 1 or row.shape[3] < 2 else row.contiguous() for row in rows]
    heads = heads_of(projection.layout)
    fill(heads, rows, [bucket.heads for bucket in projection.buckets])
    tokens = rows[0].shape[2]
    return _run(query_BGXM, heads, mask, scaling, tokens=tokens, block=max(1, tokens), R=1)


def decode_paged(
    query_BGXM: Tensor, paged: Paged, reads: Reads, scaling: float
) -> tuple[Tensor, Tensor]:
    """`decode` of rows in pages: one query position a sequence over its own ranges of tokens.

    Queries are `per_head(projection.enter(query_BHQD), projection.query)` in the dtype of the
    numbers, and outputs wait for `projection.output` and `leave`, as in `cpu.decode`; see
    `matkv.attention.latent.attend_paged` for all of it. A sequence that reads nothing gets zeros
    and a log-sum-exp of minus infinity.

    [BGXM -> BGXM, BGX]

    Raises:
        RuntimeError: there is no compiled kernel here; `compiled.kernel()` tells.
    """
    table_BX, ranges_BR2 = reads.table_BX, reads.ranges_BR2
    held = paged.numbers_KNP.dtype
    assert held == query_BGXM.dtype, f"pages hold {held}, not {query_BGXM.dtype}"
    assert table_BX.dtype == ranges_BR2.dtype == torch.int32, "pages and ranges are not int32"
    table_BX, ranges_BR2 = table_BX.contiguous(), ranges_BR2.contiguous()
    return _run(
        query_BGXM, paged.heads, None, scaling,
        table=table_BX.data_ptr(), table_stride=table_BX.shape[1],
        ranges=ranges_BR2.data_ptr(), R=ranges_BR2.shape[1], block=paged.tokens,
    )  # fmt: skip


def _run(
    query_BGXM: Tensor,
    heads: Heads,
    mask: Tensor | None,
    scaling: float,
    **places: int,
) -> tuple[Tensor, Tensor]:
    found = kernel()
    if found is None:
        raise RuntimeError("there is no compiled kernel: see matkv doctor")
    query_BGXM = query_BGXM.contiguous()
    B, G, X, M = query_BGXM.shape
    out_BGXM = torch.empty_like(query_BGXM)
    lse_BGX = query_BGXM.new_empty(B, G, X, dtype=torch.float32)
    call = _Call(
        query=query_BGXM.data_ptr(), out=out_BGXM.data_ptr(), lse=lse_BGX.data_ptr(),
        heads=ctypes.addressof(heads), gains=_gains().data_ptr(), parallel=found.parallel,
        B=B, G=G, X=X, M=M, dtype=DTYPES[query_BGXM.dtype], threads=torch.get_num_threads(),
        scaling=scaling, **places,
    )  # fmt: skip
    if mask is not None:
        mask = mask.to(query_BGXM.dtype)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        call.mask, call.mask_stride = mask.data_ptr(), mask.stride(0) if len(mask) > 1 else 0
    if found.decode(ctypes.byref(call)):
        raise MemoryError("no memory for attention's partial sums")
    return out_BGXM, lse_BGX


@cache
def _gains() -> Tensor:
    """What every byte of a gain means.  [256], fp32"""
    zero, steps = Coder.gain_scale
    return ((torch.arange(256) - zero) / steps).exp2()
