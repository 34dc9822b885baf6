"""Decoding on the CPU by the compiled kernel, rows.c: one call for all sequences, heads and tokens.

`decode` reads the rows of matkv's own caches, `decode_pages` those in an engine's pages.

Shapes: B batch, G KV head, N heads of one bucket, X query head of a KV head, T cached token,
K block of a sequence, C row columns, M view columns, Y bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from matkv.attention.kernels.compiled import kernel
from matkv.bases.quantizer import gains
from matkv.latents.layer import LayerProjection

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Of a head: address, bytes to the next block and to the next token, of numbers and then of codes;
# then `row_layout` of key and value.
PLACES, HEAD = 6, 20


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
class Pages:
    """Rows of many sequences' tokens in blocks of one buffer, as serving engines keep them.

    Token t of sequence b lies in `memory[table_BK[b, t // block], t % block]`, with the numbers of
    a head at the first of its two `places` there and its codes at the second (see `places_of`, or
    any other layout). Only the first `lengths_B` tokens of each sequence are read.
    `memory` is uint8 [blocks, block, Y], its last axis dense and the others strided anyhow;
    `table_BK` and `lengths_B` are int32, and all of them are on the CPU.
    """

    memory: Tensor
    table_BK: Tensor
    lengths_B: Tensor
    places: Sequence[tuple[int, int]]


def places_of(projection: LayerProjection, dtype: torch.dtype) -> tuple[list[tuple[int, int]], int]:
    """Where heads, in sorted order, have numbers and codes in a token's bytes, and these bytes.

    The numbers of all heads come first, so that they can be viewed in their dtype; then the codes.
    """
    sizes = [
        (heads, columns * kind.itemsize, kind == torch.uint8)
        for heads, columns, kind in projection.storages(dtype)
    ]
    number, code = 0, sum(heads * size for heads, size, is_codes in sizes if not is_codes)
    numbers, codes = [], []
    for heads, size, is_codes in sizes:
        for _ in range(heads):
            if is_codes:
                codes.append(code)
                code += size
            else:
                numbers.append(number)
                number += size
    return list(zip(numbers, codes or numbers, strict=True)), code


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
    heads = _heads(projection.layout)
    kinds = 1 if projection.coder is None else 2
    for index, bucket in enumerate(projection.buckets):
        for kind, row in enumerate(rows[kinds * index : kinds * (index + 1)]):
            address, size = row.data_ptr(), row.element_size()
            block, head, token, _ = row.stride()
            for n, g in enumerate(range(bucket.heads.start, bucket.heads.stop)):
                first = HEAD * g + 3 * kind
                heads[first : first + 3] = address + n * head * size, block * size, token * size
    tokens = rows[0].shape[2]
    return _run(query_BGXM, heads, mask, scaling, tokens=tokens, block=max(1, tokens))


def decode_pages(
    query_BGXM: Tensor,
    pages: Pages,
    projection: LayerProjection,
    scaling: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode` of rows in pages: one query position a sequence over its own length of tokens.

    `query_BGXM` is what `per_head(projection.enter(query), projection.query)` gives, heads in
    sorted order, in the dtype of the pages' numbers; the output waits for `projection.output` and
    `leave`. `mask` is additive, [B|1 1 1 T] with T at least the longest length. A sequence of
    length 0 gets zeros and a log-sum-exp of minus infinity, which `parts.merge` takes as nothing.

    [BGXM -> BGXM, BGX]

    Raises:
        RuntimeError: there is no compiled kernel here; `compiled.kernel()` tells.
    """
    memory = pages.memory
    heads = _heads(projection.layout)
    block, token, _ = memory.stride()
    for g, places in enumerate(pages.places):
        for kind, place in enumerate(places):
            first = HEAD * g + 3 * kind
            heads[first : first + 3] = memory.data_ptr() + place, block, token
    table_BK, lengths_B = pages.table_BK, pages.lengths_B.contiguous()
    assert memory.dtype == torch.uint8 and memory.stride(2) == 1
    assert table_BK.dtype == lengths_B.dtype == torch.int32 and table_BK.stride(1) == 1
    return _run(
        query_BGXM, heads, mask, scaling,
        table=table_BK.data_ptr(), table_stride=table_BK.stride(0), lengths=lengths_B.data_ptr(),
        block=memory.shape[1],
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
    return gains(torch.arange(256))


def _heads(layout: tuple[tuple[int, ...], ...]) -> ctypes.Array[ctypes.c_int64]:
    """Places yet to be filled in, and the layout of every head."""
    template, number = _template(layout)
    return (ctypes.c_int64 * number).from_buffer_copy(template)


@lru_cache(maxsize=4096)
def _template(layout: tuple[tuple[int, ...], ...]) -> tuple[bytes, int]:
    numbers = [
        number
        for key, value in zip(layout[::2], layout[1::2], strict=True)
        for number in (*(0,) * PLACES, *key, *value)
    ]
    return bytes((ctypes.c_int64 * len(numbers))(*numbers)), len(numbers)
