"""Decoding on the CPU by the compiled kernel, rows.c: one call for all sequences, heads and tokens.

`decode` reads the rows of matkv's own caches. `attend_paged` is a server's whole step of one layer,
on pages, from queries to outputs: dozens of small operations of torch would cost more than it.

Shapes: B sequence, G KV head, N heads of one bucket, X query head of a KV head, T cached token,
C row columns, M view columns, P columns without codes, Y bytes. In a step: T token, H query head,
X page of a sequence, R range of tokens, D head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from matkv.latents.coding import Coder
from matkv.latents.compiled import Kernel, kernel
from matkv.latents.layer import LayerProjection
from matkv.latents.native import DTYPES, Heads, Paged, fill, heads_of


class _Call(ctypes.Structure):
    """`struct call` of rows.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "lse", "heads", "mask")),
        *((name, ctypes.c_void_p) for name in ("table", "ranges", "gains", "parallel")),
        *((name, ctypes.c_int64) for name in ("B", "G", "X", "M", "dtype", "tokens")),
        *((name, ctypes.c_int64) for name in ("mask_stride", "table_stride", "block", "threads")),
        *((name, ctypes.c_int64) for name in ("R", "wide")),
        ("scaling", ctypes.c_double),
    )


class _Step(ctypes.Structure):
    """`struct step` of rows.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "tokens")),
        *((name, ctypes.c_void_p) for name in ("query_map", "output_map", "order")),
        *((name, _Call) for name in ("far", "near")),
        *((name, ctypes.c_int64) for name in ("D", "dtype", "map_dtype", "query_t", "out_t")),
    )


@dataclass(frozen=True)
class Reads:
    """What one query of every sequence reads in pages: tokens of some ranges of its own.

    Token t of sequence b is at place t % N of page `table_BX[b, t // N]`. Of each pair in
    `ranges_BR2` the first token is read, and the last is not; ranges may be empty, and must not
    overlap. What is outside of them is not read, whatever it is. Both are int32 and dense.
    """

    paged: Paged
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


def attend_paged(
    query_THD: Tensor,
    out_THD: Tensor,
    projection: LayerProjection,
    far: Reads,
    near: Reads | None = None,
    *,
    tokens_B: Tensor | None = None,
    scaling: float,
) -> None:
    """Attention of one query of every sequence over what it reads in pages, into its output.

    `far` is of rows of the projection, `near` of whole keys and values, in pages whose heads are
    in the model's order. Sequence b's query is that of token `tokens_B[b]`, int64, or of token b.
    One that reads nothing gets zeros.

    Raises:
        RuntimeError: there is no compiled kernel here; `compiled.kernel()` tells.
    """
    B, (_, H, D), (G, _, M) = len(far.table_BX), query_THD.shape, projection.query.shape
    dense = (D, 1)
    query_THD = query_THD if query_THD.stride()[1:] == dense else query_THD.contiguous()
    assert out_THD.stride()[1:] == dense and out_THD.dtype == query_THD.dtype
    order_G, maps = projection.order, (projection.query, projection.output)
    query_map, output_map = (one.contiguous() for one in maps)
    size = {"B": B, "G": G, "X": H // G}
    step = _Step(
        query=query_THD.data_ptr(), out=out_THD.data_ptr(),
        tokens=None if tokens_B is None else tokens_B.data_ptr(),
        query_map=query_map.data_ptr(), output_map=output_map.data_ptr(), order=order_G.data_ptr(),
        far=_paged_call(far, scaling, M=M, **size),
        D=D, dtype=DTYPES[query_THD.dtype], map_dtype=DTYPES[query_map.dtype],
        query_t=query_THD.stride(0), out_t=out_THD.stride(0),
    )  # fmt: skip
    if near is not None:
        step.near = _paged_call(near, scaling, M=D, **size)
    if _kernel().step(ctypes.byref(step)):
        raise MemoryError("no memory for attention's partial sums")


def _paged_call(reads: Reads, scaling: float, **sizes: int) -> _Call:
    paged, table_BX, ranges_BR2 = reads.paged, reads.table_BX, reads.ranges_BR2
    assert table_BX.dtype == ranges_BR2.dtype == torch.int32, "pages and ranges are not int32"
    assert table_BX.is_contiguous() and ranges_BR2.is_contiguous(), "pages or ranges are not dense"
    return _Call(
        heads=ctypes.addressof(paged.heads), gains=_gains().data_ptr(),
        parallel=_kernel().parallel, threads=torch.get_num_threads(),
        table=table_BX.data_ptr(), table_stride=table_BX.shape[1],
        ranges=ranges_BR2.data_ptr(), R=ranges_BR2.shape[1],
        dtype=DTYPES[paged.numbers_KNP.dtype], block=paged.tokens, scaling=scaling, **sizes,
    )  # fmt: skip


def _kernel() -> Kernel:
    found = kernel()
    if found is None:
        raise RuntimeError("there is no compiled kernel: see matkv doctor")
    return found


def _run(
    query_BGXM: Tensor,
    heads: Heads,
    mask: Tensor | None,
    scaling: float,
    **places: int,
) -> tuple[Tensor, Tensor]:
    found = _kernel()
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
