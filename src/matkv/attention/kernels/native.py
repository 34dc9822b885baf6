"""Decoding on the CPU by the compiled kernel, rows.c: one call for all sequences, heads and tokens.

`decode` reads the rows of matkv's own caches, `decode_paged` those in the pages of a server.

Shapes: B sequence, G KV head, N heads of one bucket, X query head of a KV head, T cached token,
C row columns, M view columns, P columns without codes, Y bytes. In pages: K page, N token of a
page, X page of a sequence, P and Y of all heads.
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
from matkv.latents.native import DTYPES, HEAD, fill, heads_of


class _Call(ctypes.Structure):
    """`struct call` of rows.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "lse", "heads", "mask")),
        *((name, ctypes.c_void_p) for name in ("table", "lengths", "gains", "parallel")),
        *((name, ctypes.c_int64) for name in ("B", "G", "X", "M", "dtype", "tokens")),
        *((name, ctypes.c_int64) for name in ("mask_stride", "table_stride", "block", "threads")),
        ("scaling", ctypes.c_double),
    )


@dataclass(frozen=True)
class Paged:
    """Rows of many sequences' tokens in pages, as serving engines keep them.

    Token t of sequence b is at place t % N of page `table_BX[b, t // N]`: its columns without codes
    in `numbers_KNP`, in the model's dtype, and its bytes in `codes_KNY`, uint8. In both heads
    follow one another in the projection's order, each with its key and its value, as `row_layout`
    says; only the last axis must be dense, so both may be views of one buffer. A plane without
    columns is not read, and neither is what lies behind the first `lengths_B` tokens of a sequence.
    `table_BX` and `lengths_B` are int32.
    """

    numbers_KNP: Tensor
    codes_KNY: Tensor
    table_BX: Tensor
    lengths_B: Tensor


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
    return _run(query_BGXM, heads, mask, scaling, tokens=tokens, block=max(1, tokens))


def decode_paged(
    query_BGXM: Tensor,
    paged: Paged,
    projection: LayerProjection,
    scaling: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode` of rows in pages: one query position a sequence over its own length of tokens.

    Queries are `per_head(projection.enter(query_BHQD), projection.query)` in the dtype of the
    numbers, and outputs wait for `projection.output` and `leave`, as in `cpu.decode`; see
    `matkv.attention.latent.attend_paged` for all of it. `mask` is additive, [B|1 1 1 T], T at least
    the longest length. A sequence of length 0 gets zeros and a log-sum-exp of minus infinity.

    [BGXM -> BGXM, BGX]

    Raises:
        RuntimeError: there is no compiled kernel here; `compiled.kernel()` tells.
    """
    heads = heads_of(projection.layout)
    kinds = 1 if projection.coder is None else 2
    storages = projection.storages(query_BGXM.dtype)
    for kind, plane in enumerate((paged.numbers_KNP, paged.codes_KNY)[:kinds]):
        size, (page, token, dense) = plane.element_size(), plane.stride()
        assert dense == 1 or plane.shape[2] < 2, "columns are not dense"
        address, g = plane.data_ptr(), 0
        for count, columns, dtype in storages[kind::kinds]:
            assert dtype == plane.dtype, f"pages hold {plane.dtype}, not {dtype}"
            for _ in range(count):
                first = HEAD * g + 3 * kind
                heads[first : first + 3] = [address, page * size, token * size]
                address, g = address + columns * size, g + 1
    table_BX, lengths_B = paged.table_BX, paged.lengths_B
    assert table_BX.dtype == lengths_B.dtype == torch.int32, "pages and lengths are not int32"
    table_BX, lengths_B = table_BX.contiguous(), lengths_B.contiguous()
    return _run(
        query_BGXM, heads, mask, scaling,
        table=table_BX.data_ptr(), table_stride=table_BX.shape[1], lengths=lengths_B.data_ptr(),
        block=paged.numbers_KNP.shape[1],
    )  # fmt: skip


def _run(
    query_BGXM: Tensor,
    heads: ctypes.Array[ctypes.c_int64],
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
