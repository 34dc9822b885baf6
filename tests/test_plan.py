"""Plans: bytes from a config equal the bytes of a real model and cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import matkv
from coded import coded, ragged_bands
from matkv.cache.cache import attached_projections, storage_nbytes
from matkv.errors import BudgetError, MatkvError, UnsupportedModelError
from matkv.hf.geometry import geometry_of
from matkv.plan import PlanCase, parameter_count, parse_bytes, plan
from matkv.ranks import RankTable
from tiny import FAMILIES, Tiny, tokens

LLAMA2_7B = transformers.LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, dtype=torch.float16,
)  # fmt: skip


def test_weights_and_cache_of_every_family_are_those_of_the_model(any_family: Tiny) -> None:
    model, config = any_family.model, any_family.model.config
    found = plan(config, PlanCase(context=20, batch=2, budget=0.5, dtype=torch.float32))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weight_bytes == 4 * found.parameters
    geometry = geometry_of(config)  # a ring's windows are too short for one otherwise
    full = RankTable.full(geometry)
    assert found.full.cache_bytes == full.nbytes(20, torch.float32, batch=2)
    half = RankTable.uniform(geometry, 0.5)
    assert found.compressed.cache_bytes == half.nbytes(20, torch.float32, batch=2)
    assert found.compressed.token_bytes == half.bytes_per_token(torch.float32)


def test_the_planned_bytes_are_what_caches_hold(llama: Tiny) -> None:
    found = plan(llama.model.config, PlanCase(context=64, budget=0.5, dtype=torch.float32))
    plain = transformers.DynamicCache(config=llama.model.config)
    ids = tokens(1, 64)
    with torch.no_grad():
        llama.model(ids, past_key_values=plain)
        llama.attach(budget=0.5)
        latent = matkv.LatentCache(llama.model)
        llama.model(ids, past_key_values=latent)
    assert storage_nbytes(plain) == found.full.cache_bytes
    assert latent.used_nbytes == latent.nbytes == found.compressed.cache_bytes


def test_an_artifact_is_planned_with_its_tables_and_its_exact_tokens(llama: Tiny) -> None:
    artifact, table = coded("llama").artifact, ragged_bands(llama.geometry)
    case = PlanCase(context=40, batch=2, budget=table.budget, dtype=torch.float32)
    found = plan(llama.model.config, case, table, sink=2, recent=5)
    assert (found.sink, found.recent) == (2, 5)
    matkv.attach(llama.model, artifact, ranks=table, sink=2, recent=5)
    cache = matkv.LatentCache(llama.model)
    with torch.no_grad():
        llama.model(tokens(2, 40), past_key_values=cache)
    assert cache.used_nbytes == found.compressed.cache_bytes
    projections = attached_projections(llama.model).values()
    buffers = [buffer for projection in projections for buffer in projection.buffers()]
    assert found.compressed.bases_bytes == sum(buffer.nbytes for buffer in buffers)


@pytest.mark.parametrize("budget", [0.5, 0.3])
def test_bases_are_the_buffers_of_an_attached_model(family: Tiny, budget: float) -> None:
    case = PlanCase(context=1, budget=budget, dtype=torch.float32)
    found = plan(family.model.config, case)
    assert found.compressed_layers == len(geometry_of(family.model.config).compressed)
    table = RankTable.uniform(family.geometry, budget, step=1)
    if len(table.geometry.compressed) > found.compressed_layers:  # windows of a few tokens
        found = plan(family.model.config, case, table)
    family.attach(ranks=table)
    projections = attached_projections(family.model).values()
    buffers = [buffer for projection in projections for buffer in projection.buffers()]
    assert found.compressed.bases_bytes == sum(buffer.nbytes for buffer in buffers)
    assert found.full.bases_bytes == 0


def test_the_largest_batch_and_context_just_fit() -> None:
    memory = 80 * 10**9
    case = PlanCase(context=131_072, batch=16, budget=0.375, memory=memory)
    found = plan(LLAMA2_7B, case)
    assert found.parameters == 6_738_415_616
    assert found.full.token_bytes == 2 * 32 * 32 * 128 * 2
    assert found.full.largest_batch == 0
    assert not found.full.fits
    for context, fits in ((found.compressed.largest_context, True), (0, False)):
        assert context is not None
        tokens_held = context if fits else (found.compressed.largest_context or 0) + 1
        again = plan(LLAMA2_7B, PlanCase(**{**vars(case), "context": tokens_held}))
        assert again.compressed.fits is fits
    batch = found.compressed.largest_batch
    assert batch is not None
    assert batch >= 2
    for sequences, fits in ((batch, True), (batch + 1, False)):
        again = plan(LLAMA2_7B, PlanCase(**{**vars(case), "batch": sequences}))
        assert again.compressed.fits is fits


def test_a_step_takes_the_time_of_reading_weights_and_cache() -> None:
    found = plan(LLAMA2_7B, PlanCase(context=1000, bandwidth=1e12))
    assert found.full.decode_ms == pytest.approx(
        1e3 * (found.weight_bytes + 1000 * found.full.token_bytes) / 1e12
    )
    assert found.compressed.decode_ms < found.full.decode_ms


def test_sliding_windows_stop_growing() -> None:
    config = FAMILIES["gemma3"]()
    short, long = (plan(config, PlanCase(context=n)).full.cache_bytes for n in (100, 200))
    growing = plan(config, PlanCase(context=1)).full.token_bytes
    assert long - short == 100 * growing


def test_without_a_memory_nothing_has_to_fit() -> None:
    found = plan(FAMILIES["llama"](), PlanCase(context=10))
    assert found.full.fits is found.full.largest_batch is found.full.largest_context is None
    assert found.to_json()["full"]["fits"] is None


def test_too_small_a_memory_fits_nothing() -> None:
    found = plan(FAMILIES["llama"](), PlanCase(context=10, memory=1))
    assert (found.full.largest_batch, found.full.largest_context) == (0, 0)


def test_tied_weights_count_once() -> None:
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = True
    untied = FAMILIES["llama"]()
    assert parameter_count(untied) - parameter_count(config) == untied.vocab_size * 64


def test_an_unsupported_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        plan(transformers.T5Config(), PlanCase(context=1))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"budget": 0.0}, BudgetError),
        ({"context": 0}, MatkvError),
        ({"batch": -1}, MatkvError),
        ({"memory": 0}, MatkvError),
        ({"bandwidth": 0.0}, MatkvError),
    ],
)
def test_impossible_cases_are_refused(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="must be"):
        PlanCase(**{"context": 1, **wrong})


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("512M", 512 * 10**6), ("1e9", 10**9), ("7", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 apples", "1.2.3GB", "4iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(MatkvError, match="must be like 80GB"):
        parse_bytes(text)
