"""Logits of a large vocabulary, a block of positions at a time.

Shapes: N position, R of a block of them, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of one chunk, student and teacher together, stay under this many elements.
CHUNK_ELEMENTS = 1 << 24
# As many elements in fp32, a few times over, stay in the caches of a processor.
CACHED_ELEMENTS = 1 << 19


def row_blocks(logits_NV: Tensor) -> Iterator[slice]:
    """Rows to take to fp32 at a time: on a CPU few enough for its caches, five times faster."""
    elements = CACHED_ELEMENTS if logits_NV.device.type == "cpu" else CHUNK_ELEMENTS
    rows = max(1, elements // logits_NV.shape[1])
    for first in range(0, len(logits_NV), rows):
        yield slice(first, first + rows)


def token_losses(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Every token's cross-entropy in fp32, made from a block of logits at a time.  [N]"""
    blocks = [
        F.cross_entropy(logits_NV[rows].float(), target_N[rows], reduction="none")
        for rows in row_blocks(logits_NV)
    ]
    return torch.cat(blocks)
