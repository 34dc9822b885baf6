"""The growing buffers of one layer by themselves.

Shapes: B batch, N head, T token, C row column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matkv.cache.rows import Rows

WIDTHS = (5, 0, 3)


def rows(tokens: int, seed: int, dtype: torch.dtype = torch.float32, B: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new = [torch.randn(B, 2, tokens, width, generator=generator) for width in WIDTHS]
    return [bucket_BNTC.to(dtype) for bucket_BNTC in new]


def test_tokens_come_back_in_order_cropped_and_selected() -> None:
    held = Rows()
    pieces = [rows(tokens, seed) for seed, tokens in enumerate((70, 0, 1, 9))]
    for piece in pieces:
        held.append(piece)
    whole = [torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)]
    assert held.count == 80
    assert all(map(torch.equal, held.first(80), whole))
    held.crop(75)
    held.select(torch.tensor([1, 1, 0]))
    assert all(map(torch.equal, held.first(75), [x[[1, 1, 0], :, :75] for x in whole]))
    assert held.used_nbytes == 3 * 2 * 75 * sum(WIDTHS) * 4


def test_a_wider_dtype_widens_what_is_there_and_a_narrower_one_is_widened() -> None:
    held, half, full = Rows(), rows(3, 1, torch.bfloat16), rows(2, 2)
    held.append(half)
    assert {buffer.dtype for buffer in held.buffers} == {torch.bfloat16}
    held.append(full)
    held.append(half)
    parts = zip(half, full, half, strict=True)
    whole = [torch.cat([x.float() for x in bucket], dim=2) for bucket in parts]
    assert all(map(torch.equal, held.first(8), whole))


def test_room_is_used_again_where_it_fits() -> None:
    held = Rows(reserve=100)
    held.append(rows(4, 1))
    assert {buffer.shape[2] for buffer in held.buffers} == {128}
    places = [buffer.data_ptr() for buffer in held.buffers]
    for batch, dtype, fits in ((2, torch.float32, True), (3, torch.float32, False)):
        held.crop(0)
        held.append(rows(90, 3, dtype, batch))
        assert ([buffer.data_ptr() for buffer in held.buffers] == places) == fits
        assert all(map(torch.equal, held.first(90), rows(90, 3, dtype, batch)))
