"""Losses made from a block of logits at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from matkv import logits
from matkv.logits import row_blocks, token_losses


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(logits, "CACHED_ELEMENTS", 7 * rows)
    logits_NV = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    covered = [index for block in row_blocks(logits_NV) for index in range(10)[block]]
    assert covered == list(range(10))
    target_N = torch.arange(10) % 7
    expected_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    torch.testing.assert_close(token_losses(logits_NV, target_N), expected_N)


def test_a_vocabulary_larger_than_a_block_goes_row_by_row() -> None:
    logits_NV = torch.zeros(3, logits.CACHED_ELEMENTS + 1)
    assert [block.stop - block.start for block in row_blocks(logits_NV)] == [1, 1, 1]


def test_losses_of_half_precision_are_taken_in_fp32() -> None:
    logits_NV = torch.full((1, 5), 300.0, dtype=torch.float16)
    assert float(token_losses(logits_NV, torch.tensor([0]))) == pytest.approx(1.609438, rel=1e-6)
