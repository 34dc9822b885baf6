"""Codes: what one latent column costs at a width in bits, and which columns of a head have which.

A column is kept in the model's dtype, which counts as 16 bits, or as a code of 8, 4 or 2 bits, or
not at all. Columns are ordered by importance, so a head's columns are a few bands, wide ones first.
A head that has codes also keeps its gain, one byte a token.
"""

from __future__ import annotations

from collections.abc import Sequence

WIDTHS = (16, 8, 4, 2)
CODED = WIDTHS[1:]
GAIN_BYTES = 1

# Columns at 16, 8, 4 and 2 bits; their sum is the rank.
Bands = tuple[int, int, int, int]


def plain_bands(rank: int) -> Bands:
    """The bands of a rank without codes."""
    return rank, 0, 0, 0


def has_codes(bands: Bands) -> bool:
    """Whether some columns are codes."""
    return any(bands[1:])


def code_bytes(bands: Bands) -> int:
    """Bytes of one token's codes and gain; every band starts with a byte of its own."""
    packed = sum(-(-columns * width // 8) for columns, width in zip(bands[1:], CODED, strict=True))
    return packed + GAIN_BYTES if has_codes(bands) else 0


def row_bytes(bands: Bands, itemsize: int) -> int:
    """Bytes of one token of a head's side; `itemsize` bytes are one number of the model's dtype."""
    return bands[0] * itemsize + code_bytes(bands)


def bands_of(widths: Sequence[int]) -> Bands:
    """The bands of columns whose widths, 0 for a dropped one, never rise.

    Raises:
        ValueError: they rise, or one is no width.
    """
    if list(widths) != sorted(widths, reverse=True) or not set(widths) <= {*WIDTHS, 0}:
        raise ValueError(f"widths {widths} must be some of {WIDTHS} or 0, and never rise")
    sixteen, eight, four, two = (sum(one == width for one in widths) for width in WIDTHS)
    return sixteen, eight, four, two


def widths_of(bands: Bands) -> list[int]:
    """The width of every kept column."""
    return [width for count, width in zip(bands, WIDTHS, strict=True) for _ in range(count)]
