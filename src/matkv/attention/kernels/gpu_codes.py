"""Decoding on a GPU where latents are kept as codes, which are unpacked in registers.

As in gpu.py a program takes one sequence, one KV head and one part of the context, and a small
launch merges the parts. Every column of codes knows its byte and its bits in it, so that all bands
of a side are one tile; bytes that hold several columns are read as often, but from cache. Gains are
of a token: they multiply scores and weights, and codes, half steps included, are exact in bf16.

Shapes: B batch, G KV head, X query head of a KV head, T cached token, M view columns, P columns
without codes, Y bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from matkv.attention.kernels import gpu
from matkv.attention.kernels.gpu import WIDEN, kept, place_of, range_of, rows_of, tile, weigh
from matkv.latents.layer import LayerProjection

# Unpacking takes registers: with more numbers to a thread than this makes, the compiler spills some
# (for compute capability 9.0, heads of 128 columns).
BLOCK_T, WARPS = 32, 8


def decode(
    query_BGXM: Tensor,
    rows: Sequence[Tensor],
    projection: LayerProjection,
    mask: Tensor | None,
    scaling: float,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`gpu.decode` of a projection with a coder, on its rows: [BNTP] and [BNTY] per bucket.

    [BGXM -> BGXM, BGX]
    """
    context = gpu.Context(rows[0].shape[2], mask)
    numbers, codes = (gpu.places(rows[kind::2]) for kind in (0, 1))
    return decode_in(context, query_BGXM, numbers, codes, projection, scaling, splits=splits)


def decode_in(
    context: gpu.Context,
    query_BGXM: Tensor,
    numbers: tuple[int, ...],
    codes: tuple[int, ...],
    projection: LayerProjection,
    scaling: float,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode` of rows wherever they are, as `gpu.decode_in`."""
    coder = projection.coder
    assert coder is not None
    X, M = query_BGXM.shape[2:]
    query_BGXM, device = query_BGXM.contiguous(), query_BGXM.device
    parts = gpu.divided(query_BGXM, context.tokens, splits)
    layout, tiles = _described(projection.layout, device)
    gain_zero, gain_steps = coder.gain_scale
    _decode_part[parts.grid](
        query_BGXM, gpu.table(numbers, device), gpu.table(codes, device), layout,
        parts.out_BGSXM, parts.lse_BGSX, *context.arguments(query_BGXM),
        parts.tokens, scaling, X, M,
        HAS_MASK=context.mask is not None, PAGE=context.page, BLOCK_T=BLOCK_T, WIDEN=WIDEN,
        GAIN_ZERO=gain_zero, GAIN_STEPS=gain_steps, BLOCK_X=tile(X), **tiles,
        num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return gpu.merged(parts, query_BGXM, projection.ranks)


@triton.jit
def _decode_part(
    query_ptr, numbers_ptr, packed_ptr, layout_ptr, part_ptr, lse_ptr,
    mask_ptr, mask_stride, pages_ptr, pages_stride, range_ptr, tokens, part_tokens, scaling, X, M,
    HAS_MASK: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr, WIDEN: tl.constexpr,
    GAIN_ZERO: tl.constexpr, GAIN_STEPS: tl.constexpr, BLOCK_X: tl.constexpr,
    KEY_NUMBERS: tl.constexpr, KEY_CODES: tl.constexpr,
    VALUE_NUMBERS: tl.constexpr, VALUE_CODES: tl.constexpr,
):  # fmt: skip
    """As in gpu.py one part of one head's context; numbers and codes of a side are two tiles."""
    b, g, s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head, splits = b * tl.num_programs(1) + g, tl.num_programs(2)
    factor = tl.float32 if WIDEN else query_ptr.dtype.element_ty
    rows_ptr, rows_b, rows_t = rows_of(numbers_ptr, g, query_ptr.dtype.element_ty)
    bytes_ptr, bytes_b, bytes_t = rows_of(packed_ptr, g, tl.uint8)
    first, tokens = range_of(range_ptr, b, s, tokens, part_tokens, PAGE)
    # Of a head's key and value seven numbers each: see `row_layout`.
    key_ptr, value_ptr = layout_ptr + 14 * g, layout_ptr + 14 * g + 7
    key_end, key_gain = tl.load(key_ptr + 1), tl.load(key_ptr + 2)
    value_first, value_end = tl.load(value_ptr), tl.load(value_ptr + 1)
    value_gain = tl.load(value_ptr + 2)
    # Columns of keys go down a tile, those of values across.
    k, v = tl.arange(0, KEY_NUMBERS)[:, None], tl.arange(0, VALUE_NUMBERS)[None, :]
    key_codes, key_byte, key_shift, key_bits = _bands(key_ptr, tl.arange(0, KEY_CODES)[:, None])
    value_codes, value_byte, value_shift, value_bits = _bands(
        value_ptr, tl.arange(0, VALUE_CODES)[None, :]
    )
    x = tl.arange(0, BLOCK_X)[:, None]
    query_ptr += (head * X + x) * M
    query = _query(query_ptr, x < X, key_end, KEY_NUMBERS).to(factor)
    query_codes = _query(query_ptr + key_end, x < X, key_codes, KEY_CODES).to(factor)
    total = tl.zeros((BLOCK_X,), tl.float32)
    highest = total - float("inf")
    out = tl.zeros((BLOCK_X, VALUE_NUMBERS), tl.float32)
    out_codes = tl.zeros((BLOCK_X, VALUE_CODES), tl.float32)
    for start in range(first, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        is_token, page, place = place_of(pages_ptr + b * pages_stride, b, t, tokens, PAGE)
        row_ptr = rows_ptr + page * rows_b + place * rows_t
        byte_ptr = bytes_ptr + page * bytes_b + place * bytes_t
        key = tl.load(row_ptr[None, :] + k, mask=is_token[None, :] & (k < key_end), other=0.0)
        code = _codes(byte_ptr[None, :], is_token[None, :], key_byte, key_shift, key_bits)
        gain = _gains(byte_ptr, is_token, key_gain, GAIN_ZERO, GAIN_STEPS)
        score = tl.dot(query, key.to(factor), input_precision="ieee")
        score += tl.dot(query_codes, code.to(factor), input_precision="ieee") * gain[None, :]
        weight, fade, highest, total = weigh(
            score * scaling, t, tokens, mask_ptr + b * mask_stride, highest, total, HAS_MASK
        )
        is_value = is_token[:, None] & (v < value_end)
        value = tl.load(row_ptr[:, None] + value_first + v, mask=is_value, other=0.0)
        more = tl.dot(weight.to(factor), value.to(factor), input_precision="ieee")
        out = out * fade[:, None] + more
        code = _codes(byte_ptr[:, None], is_token[:, None], value_byte, value_shift, value_bits)
        weight *= _gains(byte_ptr, is_token, value_gain, GAIN_ZERO, GAIN_STEPS)[None, :]
        more = tl.dot(weight.to(factor), code.to(factor), input_precision="ieee")
        out_codes = out_codes * fade[:, None] + more
    place, total = (head * splits + s) * X + x, total[:, None]
    tl.store(lse_ptr + place, highest[:, None] + tl.log(kept(total)), mask=x < X)
    part_ptr += place * M
    _keep(part_ptr, out / kept(total), x < X, value_end, VALUE_NUMBERS)
    _keep(part_ptr + value_end, out_codes / kept(total), x < X, value_codes, VALUE_CODES)


@triton.jit
def _bands(side_ptr, c):
    """A side's columns of codes: their number, and each one's byte, shift and bits.

    Columns that the head does not have, have no bits.
    """
    eight, four, two = tl.load(side_ptr + 4), tl.load(side_ptr + 5), tl.load(side_ptr + 6)
    bytes_four, bytes_two = (four + 1) // 2, (two + 3) // 4
    # In a band of n bytes, byte i holds columns i, i + n, ...
    in_four, in_two = tl.maximum(c - eight, 0), tl.maximum(c - eight - four, 0)
    byte_four = eight + in_four % tl.maximum(bytes_four, 1)
    byte_two = eight + bytes_four + in_two % tl.maximum(bytes_two, 1)
    shift_four = 4 * (in_four // tl.maximum(bytes_four, 1))
    shift_two = 2 * (in_two // tl.maximum(bytes_two, 1))
    is_eight, is_four, is_two = c < eight, c < eight + four, c < eight + four + two
    byte = tl.where(is_eight, c, tl.where(is_four, byte_four, byte_two))
    shift = tl.where(is_eight, 0, tl.where(is_four, shift_four, tl.where(is_two, shift_two, 0)))
    bits = tl.where(is_eight, 8, tl.where(is_four, 4, tl.where(is_two, 2, 0)))
    byte += tl.load(side_ptr + 3)
    return eight + four + two, byte, shift, bits


@triton.jit
def _codes(byte_ptr, is_token, byte, shift, bits):
    """Codes in units of a step: halfway between whole numbers, and as many below zero as above."""
    packed = tl.load(byte_ptr + byte, mask=is_token & (bits > 0), other=0).to(tl.int32)
    levels = 1 << bits
    return ((packed >> shift) & (levels - 1)).to(tl.float32) - (levels.to(tl.float32) - 1) / 2


@triton.jit
def _gains(byte_ptr, is_token, place, ZERO: tl.constexpr, STEPS: tl.constexpr):
    """A side's gains, of which it has none where their place is -1."""
    code = tl.load(byte_ptr + place, mask=is_token & (place >= 0), other=ZERO)
    return tl.exp2((code.to(tl.float32) - ZERO) / STEPS)


@triton.jit
def _query(query_ptr, is_x, columns, BLOCK: tl.constexpr):
    """So many columns of every query head."""
    c = tl.arange(0, BLOCK)[None, :]
    return tl.load(query_ptr + c, mask=is_x & (c < columns), other=0.0)


@triton.jit
def _keep(part_ptr, out, is_x, columns, BLOCK: tl.constexpr):
    """Write so many columns of every query head."""
    c = tl.arange(0, BLOCK)[None, :]
    tl.store(part_ptr + c, out, mask=is_x & (c < columns))


@lru_cache(maxsize=4096)
def _described(
    layout: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[Tensor, dict[str, int]]:
    """A projection's layout on the device, and the columns of tiles that hold every head's."""
    sides = {"KEY": layout[::2], "VALUE": layout[1::2]}
    numbers = {f"{side}_NUMBERS": max(one[1] for one in sides[side]) for side in sides}
    codes = {f"{side}_CODES": max(sum(one[4:]) for one in sides[side]) for side in sides}
    tiles = {name: tile(columns) for name, columns in (numbers | codes).items()}
    return torch.tensor(layout, dtype=torch.int32, device=device), tiles
