"""Rows of codes and the maps that go with them."""

from __future__ import annotations

import pytest
import torch

import matkv
from coded import coded
from matkv.cache.cache import attached_projections
from matkv.latents.layer import projections_nbytes


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("seed", range(3))
def test_maps_take_the_bytes_that_are_promised(name: str, seed: int) -> None:
    subject = coded(name)
    table = subject.ragged(seed)
    model = subject.attach(ranks=table)
    try:
        buffers = [b for one in attached_projections(model).values() for b in one.buffers()]
        assert sum(b.nbytes for b in buffers) == projections_nbytes(table, torch.float32)
    finally:
        matkv.detach(model)


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_as_wide_as_their_storages(seed: int) -> None:
    subject = coded("llama")
    table, dim = subject.ragged(seed), subject.geometry.layers[0].head_dim
    model = subject.attach(ranks=table)
    try:
        states = torch.randn(2, 2, 2, 7, dim, generator=torch.Generator().manual_seed(seed))
        held = 0
        for projection in attached_projections(model).values():
            rows = projection.encode(*states)
            sizes = projection.storages(torch.float32)
            assert [(r.shape[1], r.shape[3], r.dtype) for r in rows] == sizes
            held += sum(r.nbytes for r in rows)
            for bucket, latents in zip(projection.buckets, projection.latents(rows), strict=True):
                heads = bucket.heads.stop - bucket.heads.start
                assert latents.shape == (2, heads, 7, bucket.row_width)
        assert held == table.nbytes(7, torch.float32, batch=2)
    finally:
        matkv.detach(model)
