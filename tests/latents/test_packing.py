"""Codes in bytes and back."""

from __future__ import annotations

import pytest
import torch

from matkv.latents.packing import pack, packed_size, unpack_into


@pytest.mark.parametrize("width", [8, 4, 2])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 8, 13, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_come_back_and_take_no_byte_too_many(
    width: int, columns: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 2**width, (2, 3, columns), generator=generator, dtype=torch.uint8)
    packed = pack(codes, width)
    assert packed.shape == (2, 3, packed_size(columns, width)) and packed.dtype == torch.uint8
    assert packed_size(columns, width) == -(-columns * width // 8)
    out = torch.empty(codes.shape, dtype=dtype)
    unpack_into(out, packed, width)
    assert torch.equal(out, codes.to(dtype))


def test_a_view_of_wider_rows_can_be_read_and_written() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    wide = torch.zeros(2, 10, dtype=torch.uint8)
    wide[:, 3:7] = pack(codes, 4)
    out = torch.zeros(2, 12)
    unpack_into(out[:, 2:10], wide[:, 3:7], 4)
    assert torch.equal(out[:, 2:10], codes.float()) and not bool(out[:, 10:].any())
