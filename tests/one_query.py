"""Attention of one query position, by a kernel and as it is written in books.

Shapes: B batch, H query head, G KV head, T token, D head dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from explicit import attend_explicit
from matkv.attention import latent as attention
from matkv.attention.latent import attend
from matkv.latents.latents import Latents
from tiny import largest_difference, random_maps

G, D, SCALING = 4, 24, 0.3
KEY, VALUE = random_maps(G, D, 1, oblique=True), random_maps(G, D, 2)


@contextmanager
def kernel(name: str) -> Iterator[Any]:
    """A module of Triton kernels, on a device of four multiprocessors."""
    pytest.importorskip("triton")
    gpu, module = (
        importlib.import_module(f"matkv.attention.kernels.{one}") for one in ("gpu", name)
    )
    with mock.patch.object(gpu, "_multiprocessors", lambda device: 4):
        yield module


def queries(batch: int, group: int) -> Tensor:
    return torch.randn(batch, G * group, 1, D, generator=torch.Generator().manual_seed(3))


def padding(starts: tuple[int, ...], length: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """A mask of sequences that start at these positions.  [B 1 1 T]"""
    seen = torch.arange(length) >= torch.tensor(starts)[:, None, None, None]
    if dtype == torch.bool:
        return seen
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


def check(decode: Any, latents: Latents, query: Tensor, mask: Tensor | None = None) -> None:
    expected = attend_explicit(latents, query, mask, scaling=SCALING)
    with mock.patch.object(attention, "_decoder", lambda *_: decode), torch.no_grad():
        out = attend(latents, query, mask, scaling=SCALING)
    assert out.shape == expected.shape
    assert largest_difference(out, expected) < 2e-6
