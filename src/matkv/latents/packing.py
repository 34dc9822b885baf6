"""Codes in bytes.

A band of n columns at b bits takes ⌈n b / 8⌉ bytes; with p = 8 / b codes in a byte, byte i holds
columns i, i + ⌈n / p⌉, i + 2 ⌈n / p⌉ ..., lowest bits first. So codes of neighbouring bytes become
neighbouring columns, and no code is moved on its own.

Shapes: C columns of one band, Y bytes.
"""

from __future__ import annotations

from torch import Tensor


def pack(codes: Tensor, width: int) -> Tensor:
    """Codes, from 0 on, of one band.  [...C -> ...Y], uint8"""
    if width == 8:
        return codes
    per_byte, columns = 8 // width, codes.shape[-1]
    size = -(-columns // per_byte)
    packed = codes.new_zeros(*codes.shape[:-1], size)
    for place in range(per_byte):
        plane = codes[..., place * size : (place + 1) * size]
        packed[..., : plane.shape[-1]] |= plane << (place * width)
    return packed


def unpack_into(out: Tensor, packed: Tensor, width: int) -> None:
    """Inverse of `pack`, written to `out` in its dtype.  [...Y -> ...C]"""
    if width == 8:
        out.copy_(packed)
        return
    per_byte, size, columns = 8 // width, packed.shape[-1], out.shape[-1]
    for place in range(per_byte):
        first, last = place * size, min(columns, (place + 1) * size)
        if first < last:
            plane = packed[..., : last - first] >> (place * width)
            # The highest bits need no mask.
            out[..., first:last] = plane if place == per_byte - 1 else plane & ((1 << width) - 1)


def packed_size(columns: int, width: int) -> int:
    """Bytes of a band."""
    return -(-columns * width // 8)
