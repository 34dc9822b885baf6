"""How peers are scored on tiny models, and how far rows are apart.

Shapes: B batch, G KV head, T token, D head dim.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from peers import coded
from peers.protocol import Protocol, Row

PROTOCOL = Protocol(length=32, context=20, chunk=5)
LENGTHS = (25, 30, 31)  # at which bytes are counted


def distance(row: Row, other: Row) -> float:
    pairs = zip(row["losses"], other["losses"], strict=True)
    return max(abs(float(one) - float(two)) for one, two in pairs)


def first_keys(cache: DynamicCache) -> torch.Tensor:
    """What the first layer holds.  [BGTD]"""
    key_BGTD, _ = states(cache)[:2]
    return key_BGTD


def states(cache: DynamicCache) -> list[torch.Tensor]:
    """Keys and values of every layer.  [BGTD]"""
    return list(coded.states(cache))


def heavy(*shape: int) -> torch.Tensor:
    """Numbers whose size differs from token to token."""
    generator = torch.Generator().manual_seed(2)
    size = torch.randn(*shape[:-1], 1, generator=generator).exp()
    return size * torch.randn(*shape, generator=generator)
