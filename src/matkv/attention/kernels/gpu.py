"""Decoding on a GPU: one Triton launch over all sequences, KV heads and parts of the context.

A program takes one sequence, one KV head and one part of the context; its tile holds all query
heads of the group, so that the cache is read once. Ranks differ from head to head: columns beyond a
head's ranks are masked, they cost arithmetic, not bytes. A second, small launch puts the parts
together by the log of their sums of exponentials.

Shapes: B batch, G KV head, X query head of a KV head, T cached token, S part of the context,
M view columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from matkv.latents.layer import LayerProjection

BLOCK_T = 64
# Programs a multiprocessor should have to hide the latency of its loads.
PROGRAMS = 4
# Triton's interpreter, in tests without a GPU, cannot multiply bf16.
WIDEN = bool(triton.knobs.runtime.interpret)


def decode(
    query_BGXM: Tensor,
    rows: Sequence[Tensor],
    projection: LayerProjection,
    mask: Tensor | None,
    scaling: float,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query position over all rows, [BNTC] per bucket.  [BGXM -> BGXM, BGX]

    `mask` is additive, [B|1 1 1 T], or None when every token is seen. The context is divided into
    `splits` parts, by default as many as keep the device busy. The second result is the log of the
    weights' sum, in fp32.
    """
    context = Context(rows[0].shape[2], mask)
    return decode_in(
        context, query_BGXM, places(rows), projection.ranks, projection.highest_ranks, scaling,
        splits=splits,
    )  # fmt: skip


@dataclass(frozen=True)
class Context:
    """Which tokens are read: the first `tokens` of every sequence's own rows, but for `mask`.

    Or, where there are pages: of sequence b those in `range_B2`, two int32 a sequence and at most
    `tokens` of them, token t at place t % `page` of page `pages_BX[b, t // page]`.
    """

    tokens: int
    mask: Tensor | None = None
    pages_BX: Tensor | None = None
    range_B2: Tensor | None = None
    page: int = 0

    def arguments(self, none: Tensor) -> tuple[Any, ...]:
        """What kernels take of it, `none` for what there is not."""
        mask, pages, ranges = (
            none if one is None else one for one in (self.mask, self.pages_BX, self.range_B2)
        )
        stride = 0 if self.pages_BX is None else self.pages_BX.stride(0)
        return mask, mask_stride(self.mask), pages, stride, ranges, self.tokens


def decode_in(
    context: Context,
    query_BGXM: Tensor,
    heads: tuple[int, ...],
    ranks_GS: Tensor,
    highest: tuple[int, int],
    scaling: float,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode` of rows wherever they are: `heads` as `places` tells, in pages of a page."""
    X, M = query_BGXM.shape[2:]
    query_BGXM = query_BGXM.contiguous()
    parts = divided(query_BGXM, context.tokens, splits)
    _decode_part[parts.grid](
        query_BGXM, table(heads, query_BGXM.device), ranks_GS, parts.out_BGSXM, parts.lse_BGSX,
        *context.arguments(query_BGXM), parts.tokens, scaling, X, M,
        HAS_MASK=context.mask is not None, PAGE=context.page, BLOCK_T=BLOCK_T, WIDEN=WIDEN,
        BLOCK_X=tile(X), BLOCK_KEY=tile(highest[0]), BLOCK_VALUE=tile(highest[1]),
    )  # fmt: skip
    return merged(parts, query_BGXM, ranks_GS)


@dataclass(frozen=True)
class Parts:
    """What the programs of the first launch leave to the second, each of so many tokens.

    Values are in the first columns, as many as the head's value rank.
    """

    out_BGSXM: Tensor
    lse_BGSX: Tensor
    tokens: int

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs of the first launch: sequences, KV heads and parts of the context."""
        return tuple(self.lse_BGSX.shape[:3])


def divided(query_BGXM: Tensor, tokens: int, splits: int | None) -> Parts:
    """Room for `splits` parts of the context, by default as many as keep the device busy.

    Parts are of whole blocks of `BLOCK_T`.
    """
    B, G, X, M = query_BGXM.shape
    device = query_BGXM.device
    blocks = triton.cdiv(tokens, BLOCK_T)
    if splits is None:
        splits = triton.cdiv(PROGRAMS * _multiprocessors(device), B * G)
    splits = max(1, min(splits, blocks))
    part_tokens = triton.cdiv(blocks, splits) * BLOCK_T
    splits = triton.cdiv(tokens, part_tokens)
    out_BGSXM = torch.empty(B, G, splits, X, M, dtype=torch.float32, device=device)
    lse_BGSX = torch.empty(B, G, splits, X, dtype=torch.float32, device=device)
    return Parts(out_BGSXM, lse_BGSX, part_tokens)


def merged(parts: Parts, query_BGXM: Tensor, ranks_GS: Tensor) -> tuple[Tensor, Tensor]:
    """The parts put together, values in the last columns, and the log of the weights' sum.

    [-> BGXM, BGX]
    """
    B, G, splits, X, M = parts.out_BGSXM.shape
    out_BGXM = torch.empty_like(query_BGXM)
    lse_BGX = torch.empty(B, G, X, dtype=torch.float32, device=query_BGXM.device)
    _merge_parts[(B, G, X)](
        parts.out_BGSXM, parts.lse_BGSX, ranks_GS, out_BGXM, lse_BGX, X, M, splits,
        BLOCK_S=triton.next_power_of_2(splits), BLOCK_M=triton.next_power_of_2(max(M, 1)),
    )  # fmt: skip
    return out_BGXM, lse_BGX


@triton.jit
def _decode_part(
    query_ptr, table_ptr, ranks_ptr, part_ptr, lse_ptr,
    mask_ptr, mask_stride, pages_ptr, pages_stride, range_ptr, tokens, part_tokens, scaling, X, M,
    HAS_MASK: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """One part of one head's context: softmax-weighted values, and the log of the weights' sum."""
    b, g, s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    heads, splits = tl.num_programs(1), tl.num_programs(2)
    rank_key, rank_value = tl.load(ranks_ptr + 2 * g), tl.load(ranks_ptr + 2 * g + 1)
    element = query_ptr.dtype.element_ty
    factor = tl.float32 if WIDEN else element
    rows_ptr, stride_b, stride_t = rows_of(table_ptr, g, element)
    first, tokens = range_of(range_ptr, b, s, tokens, part_tokens, PAGE)
    x = tl.arange(0, BLOCK_X)
    r_key, r_value = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    is_key, is_value = r_key < rank_key, r_value < rank_value
    head = b * heads + g
    query = tl.load(
        query_ptr + (head * X + x[:, None]) * M + r_key[None, :],
        mask=(x[:, None] < X) & is_key[None, :],
        other=0.0,
    )
    highest = tl.full((BLOCK_X,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_X,), tl.float32)
    out = tl.zeros((BLOCK_X, BLOCK_VALUE), tl.float32)
    for start in range(first, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        is_token, page, place = place_of(pages_ptr + b * pages_stride, b, t, tokens, PAGE)
        row_ptr = rows_ptr + page * stride_b + place * stride_t
        is_key_there = is_key[:, None] & is_token[None, :]
        key = tl.load(row_ptr[None, :] + r_key[:, None], mask=is_key_there, other=0.0)
        score = tl.dot(query.to(factor), key.to(factor), input_precision="ieee") * scaling
        weight, fade, highest, total = weigh(
            score, t, tokens, mask_ptr + b * mask_stride, highest, total, HAS_MASK
        )
        value_ptr = row_ptr[:, None] + rank_key + r_value[None, :]
        value = tl.load(value_ptr, mask=is_token[:, None] & is_value[None, :], other=0.0)
        more = tl.dot(weight.to(factor), value.to(factor), input_precision="ieee")
        out = out * fade[:, None] + more
    place = (head * splits + s) * X + x
    tl.store(lse_ptr + place, highest + tl.log(kept(total)), mask=x < X)
    tl.store(
        part_ptr + place[:, None] * M + r_value[None, :],
        out / kept(total)[:, None],
        mask=(x[:, None] < X) & is_value[None, :],
    )


@triton.jit
def rows_of(table_ptr, g, element: tl.constexpr):
    """A head's first row, and the elements from a sequence, or page, and a token to the next.

    `table_ptr` is of `places`.
    """
    address = tl.load(table_ptr + 3 * g)
    stride_b, stride_t = tl.load(table_ptr + 3 * g + 1), tl.load(table_ptr + 3 * g + 2)
    return address.to(tl.pointer_type(element)), stride_b, stride_t


@triton.jit
def range_of(range_ptr, b, s, tokens, part_tokens, PAGE: tl.constexpr):
    """The first token of a part of what a sequence reads, and the one after the last."""
    first = s * part_tokens
    if PAGE:
        first, tokens = first + tl.load(range_ptr + 2 * b), tl.load(range_ptr + 2 * b + 1)
    return first, tl.minimum(first + part_tokens, tokens)


@triton.jit
def place_of(pages_ptr, b, t, tokens, PAGE: tl.constexpr):
    """Which are tokens, and where they are: the sequence, or their pages, and the places there."""
    is_token, place = t < tokens, t.to(tl.int64)
    page = place * 0 + b
    if PAGE:
        page = tl.load(pages_ptr + t // PAGE, mask=is_token, other=0).to(tl.int64)
        place = place % PAGE
    return is_token, page, place


@triton.jit
def kept(total):
    """What to divide by: not zero, where no token was read."""
    return tl.where(total > 0, total, 1.0)


@triton.jit
def weigh(score, t, tokens, mask_ptr, highest, total, HAS_MASK: tl.constexpr):
    """Weights of a block of tokens, what earlier ones fade to, the new highest score and total."""
    is_token = t < tokens
    if HAS_MASK:
        bias = tl.load(mask_ptr + t, mask=is_token, other=0.0)
        score += bias.to(tl.float32)[None, :]
    # A masked token keeps a finite score: a query that sees nothing must not become NaN.
    score = tl.where(is_token[None, :], tl.maximum(score, -1e30), -float("inf"))
    higher = tl.maximum(highest, tl.max(score, 1))
    fade, weight = tl.exp(highest - higher), tl.exp(score - higher[:, None])
    return weight, fade, higher, total * fade + tl.sum(weight, 1)


@triton.jit
def _merge_parts(
    part_ptr, lse_ptr, ranks_ptr, out_ptr, all_lse_ptr, X, M, splits,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One query head: its parts, each with its share of the weights, into the last columns."""
    b, g, x = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head = b * tl.num_programs(1) + g
    rank_value = tl.load(ranks_ptr + 2 * g + 1)
    s, m = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M)
    place = (head * splits + s) * X + x
    lse = tl.load(lse_ptr + place, mask=s < splits, other=-float("inf"))
    highest = tl.max(lse, 0)
    weight = tl.exp(lse - tl.maximum(highest, -1e30))  # of no token at all: zero
    total = tl.sum(weight, 0)
    column = m - (M - rank_value)
    part = tl.load(
        part_ptr + place[:, None] * M + column[None, :],
        mask=(s[:, None] < splits) & ((column >= 0) & (m < M))[None, :],
        other=0.0,
    )
    out = tl.sum(part * weight[:, None], 0) / kept(total)
    tl.store(all_lse_ptr + head * X + x, highest + tl.log(kept(total)))
    tl.store(out_ptr + (head * X + x) * M + m, out.to(out_ptr.dtype.element_ty), mask=m < M)


def mask_stride(mask: Tensor | None) -> int:
    """Elements from a sequence's mask to the next one's; 0 where they share one."""
    return 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)


def tile(size: int) -> int:
    """A power of two that holds `size`, 16 at least for matrix units."""
    return max(16, int(triton.next_power_of_2(size)))


def places(rows: Sequence[Tensor]) -> tuple[int, ...]:
    """Of every head, in sorted order: address of its first row, and two strides in elements."""
    found: list[int] = []
    for rows_BNTC in rows:
        stride_b, stride_n, stride_t, _ = rows_BNTC.stride()
        step = stride_n * rows_BNTC.element_size()
        for n in range(rows_BNTC.shape[1]):
            found += (rows_BNTC.data_ptr() + n * step, stride_b, stride_t)
    return tuple(found)


@lru_cache(maxsize=4096)
def table(places: tuple[int, ...], device: torch.device) -> Tensor:
    """`places` on the device. They change only when a buffer grows: one copy serves many tokens."""
    return torch.tensor(places, dtype=torch.int64, device=device)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
