"""Sliding windows in the whole pipeline: calibrated, trained, searched, stored and used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from pydantic import TypeAdapter

import matkv
from lessons import quick, text
from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.calibrate import CalibrateConfig
from matkv.distill import distill
from matkv.evaluate.texts import perplexity
from matkv.hf.geometry import geometry_of
from matkv.ranks import Geometry, RankTable
from tiny import COMMON, from_config, largest_difference, stepwise, tokens

WINDOW = 64


def model_with(window: int, seed: int = 0) -> transformers.PreTrainedModel:
    config = transformers.Gemma3TextConfig(
        **COMMON | {"num_hidden_layers": 3},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=window,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    model: transformers.PreTrainedModel = from_config(config, seed)
    return model


@pytest.mark.parametrize(("window", "compressed"), [(WINDOW, (0, 1, 2)), (WINDOW - 1, (2,))])
def test_long_windows_are_compressed_and_short_ones_not(
    window: int, compressed: tuple[int, ...]
) -> None:
    config = model_with(window).config
    geometry = geometry_of(config)
    assert geometry.compressed == compressed
    assert geometry_of(config, windows=False).compressed == (2,)
    assert geometry.without_rings() == geometry_of(config, windows=False)


def test_windows_may_be_left_whole() -> None:
    model = model_with(WINDOW)
    made = matkv.calibrate(model, [tokens(2, 80)], CalibrateConfig(windows=False))
    assert set(made.bases) == {2} and made.geometry.staying == 2
    matkv.attach(model, made, 0.5)
    ids = tokens(1, 90)
    with torch.no_grad():
        uncached = model(ids, use_cache=False).logits
    assert largest_difference(stepwise(model, ids, (70,)), uncached) < 1e-5


def test_bytes_count_what_the_windows_hold() -> None:
    geometry = geometry_of(model_with(WINDOW).config)
    quarter, row = RankTable.uniform(geometry, 0.25), 2 * 2 * 16 * 4
    for length in (10, 63, 64, 500):
        held = min(length, WINDOW - 1)
        assert quarter.nbytes(length, torch.float32) == (2 * held + length) * row // 4
        sinks = max(0, 3 - (length - held))  # in the window
        exact = 2 * (sinks + 5) + 3 + 5
        rows = 2 * held + length - exact
        promised = exact * row + rows * row // 4
        assert quarter.nbytes(length, torch.float32, sink=3, recent=5) == promised
    assert quarter.nbytes(100, torch.float32, recent=80) == 2 * 63 * row + 80 * row + 20 * row // 4
    assert quarter.bytes_per_token(torch.float32) == 3 * row // 4
    assert quarter.added_bytes(torch.float32) == row // 4
    assert quarter.held(50) == quarter.held(10**6) == 0.25


def test_geometries_without_rings_are_stored_as_before() -> None:
    with_rings = geometry_of(model_with(WINDOW).config)
    without = with_rings.without_rings()
    assert [layer.get("ring") for layer in with_rings.to_json()["layers"]] == [True, True, None]
    assert all("ring" not in layer for layer in without.to_json()["layers"])
    read = TypeAdapter(Geometry).validate_python
    assert read(with_rings.to_json()) == with_rings and read(without.to_json()) == without


def test_the_whole_pipeline(tmp_path: Path) -> None:
    model = model_with(WINDOW)
    sequences = [text(2, 100) for _ in range(4)]
    made = matkv.calibrate(model, sequences, CalibrateConfig(sink=2, recent=4))
    assert set(made.bases) == {0, 1, 2}
    trained = distill(model, made, sequences[0], quick())
    assert all(
        largest_difference(
            trained.maps(layer, "key").encode_XDD, made.maps(layer, "key").encode_XDD
        )
        > 1e-4
        for layer in made.geometry.compressed
    )
    config = AllocateConfig(budgets=(0.3,), search_tokens=200, held_out_tokens=200, expansions=4)
    found = allocate(model, trained, iter(sequences), config)
    table = found.tables[0.3]
    assert {cell[0] for cell in table.coded} == {0, 1, 2} and 0.2 < table.budget <= 0.3
    found.save(tmp_path / "run")
    loaded = Artifact.load(tmp_path / "run")
    assert loaded.geometry == found.geometry and loaded.tables == found.tables
    full = perplexity(model, sequences[1])[0]
    matkv.attach(model, loaded, 0.3)
    assert abs(perplexity(model, sequences[1])[0] / full - 1) < 0.2
    ids = tokens(1, 150)
    with torch.no_grad():
        uncached = model(ids, use_cache=False).logits
    cache = matkv.LatentCache(model)
    assert largest_difference(stepwise(model, ids, (100,), cache), uncached) < 0.02
    promised = loaded.tables[0.3].nbytes(150, torch.float32, sink=2, recent=4)
    assert cache.used_nbytes == promised
