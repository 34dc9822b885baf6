"""Shrinking a live cache: what a smaller table holds of the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import matkv
from coded import Coded, coded
from matkv.allocate.bits import Waterline
from matkv.allocate.config import Constraints
from matkv.errors import BudgetError, CacheError, MatkvError
from matkv.hf.attach import attached_table
from matkv.hf.shrink import shrink
from matkv.ranks import SIDES
from tiny import Tiny, largest_difference, latent_layers, tiny, tokens

BUDGETS = (1.0, 0.6, 0.4, 0.25, 0.15)


def with_tables(name: str) -> Coded:
    """A tiny model whose tables are nested, by damage that falls from column to column."""
    subject = coded(name)
    damage = {}
    generator = torch.Generator().manual_seed(0)
    for layer in subject.geometry.compressed:
        shape = subject.geometry.layers[layer]
        for side in SIDES:
            for head in range(shape.kv_heads):
                fall_D = torch.logspace(0, -4, shape.head_dim)
                noise_D = fall_D * torch.rand(shape.head_dim, generator=generator)
                errors_W = torch.tensor([0.0, 1e-4, 1e-2, 0.12, 1.0])
                damage[layer, side, head] = noise_D[:, None] * errors_W
    line = Waterline(subject.geometry, damage, Constraints(step=3), (16, 8, 4, 2))
    artifact = replace(subject.artifact, tables=line.tables(BUDGETS))
    return Coded(subject.model, artifact)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma3_rings", "qwen3"])
@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (2, 3)])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.6), (1.0, 0.25), (0.6, 0.4), (0.4, 0.15)])
@torch.no_grad()
def test_a_shrunk_cache_is_one_filled_at_the_smaller_table(
    name: str, sink: int, recent: int, start: float, end: float
) -> None:
    subject, ids = with_tables(name), tokens(2, 30)
    model = subject.attach(budget=end, sink=sink, recent=recent)
    try:
        small = matkv.LatentCache(model)
        expected = model(ids, past_key_values=small).logits
        matkv.attach(model, subject.artifact, start, sink=sink, recent=recent)
        cache = matkv.LatentCache(model)
        large = model(ids, past_key_values=cache).logits
        table = shrink(model, cache, end)
        assert table == subject.artifact.tables[end] == attached_table(model)
        promised = table.nbytes(30, torch.float32, batch=2, sink=sink, recent=recent)
        assert cache.used_nbytes == small.used_nbytes == promised
        step = tokens(2, 1, seed=3)
        after = model(step, past_key_values=cache).logits
        filled = model(step, past_key_values=small).logits
        lost = largest_difference(expected, large)
        assert largest_difference(after, filled) < 2 * lost
    finally:
        matkv.detach(model)


@torch.no_grad()
def test_columns_of_the_same_width_keep_their_codes() -> None:
    subject, ids = with_tables("llama"), tokens(1, 20)
    model = subject.attach(budget=0.6)
    try:
        cache = matkv.LatentCache(model)
        model(ids, past_key_values=cache)
        layers = latent_layers(cache)
        before = [layer.projection.latents(layer.rows.first(20)) for layer in layers]
        for layer, old in zip(layers, before, strict=True):
            layer.narrow(layer.projection)
            new = layer.projection.latents(layer.rows.first(20))
            for one, other in zip(new, old, strict=True):
                torch.testing.assert_close(one, other)
    finally:
        matkv.detach(model)


@torch.no_grad()
def test_refusals_change_nothing() -> None:
    subject = with_tables("llama")
    model = subject.model
    subject.attach(budget=0.4)
    try:
        cache = matkv.LatentCache(model)
        matkv.detach(model)
        with pytest.raises(MatkvError, match="not attached"):
            shrink(model, cache, 0.25)
        subject.attach(budget=0.4)
        model(tokens(1, 8), past_key_values=cache)
        with pytest.raises(BudgetError, match="is no smaller"):
            shrink(model, cache, 0.6)
        other: Tiny = tiny("llama")
        matkv.attach(model, other.artifact, 0.5)
        with pytest.raises(CacheError, match="not of this model's bases"):
            shrink(model, cache, 0.25)
        assert attached_table(model).budget == 0.5
    finally:
        matkv.detach(model)


@torch.no_grad()
def test_a_cache_of_exact_tokens_alone_shrinks_and_goes_on() -> None:
    subject, ids = with_tables("llama"), tokens(2, 30)
    model = subject.attach(budget=1.0, sink=2, recent=8)
    try:
        cache = matkv.LatentCache(model)
        model(ids[:, :6], past_key_values=cache)
        shrink(model, cache, 0.4)
        expected = model(ids, use_cache=False).logits[:, 6:]
        found = model(ids[:, 6:], past_key_values=cache).logits
        assert largest_difference(found, expected) < 0.02
    finally:
        matkv.detach(model)
