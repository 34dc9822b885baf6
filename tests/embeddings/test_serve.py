"""One size of a model: cut, saved, loaded, and given back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

from matkv.embeddings import encode_rungs, truncate, truncated
from matkv.embeddings.serve import record, trained_sizes
from matkv.errors import SizeError
from tiny_embedders import ARCHITECTURES, HIDDEN, LAYERS, TEXTS, build

# transformers 5.16 writes a ModernBERT with one kind of attention that it cannot read again.
OLD = Version(transformers.__version__) < Version("5.17")
SIZES = ((1, 8), (2, 12), (LAYERS, 16), (3, HIDDEN), (LAYERS, HIDDEN))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_way_to_a_size_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model = build(name, modules.Normalize())
    found = encode_rungs(model, TEXTS, SIZES)
    model.save_pretrained(str(tmp_path / "whole"))
    for layer, dim in SIZES:
        wanted = found[layer, dim]
        assert wanted.shape == (len(TEXTS), dim)
        if name == "modernbert" and layer == 1 and OLD:
            continue
        small = truncate(model, layer, dim)
        small.save_pretrained(str(tmp_path / "small"))
        ways = [small, SentenceTransformer(str(tmp_path / "small"), device="cpu")]
        ways.append(
            SentenceTransformer(
                str(tmp_path / "whole"),
                device="cpu",
                truncate_dim=dim,
                config_kwargs={"num_hidden_layers": layer},
            )
        )
        for way in ways:
            assert len(way[0].model.get_submodule(_stack(name))) == layer
            assert np.array_equal(way.encode(TEXTS), wanted)
        with truncated(model, layer, dim):
            assert np.array_equal(model.encode(TEXTS), wanted)
    assert np.array_equal(model.encode(TEXTS), found[LAYERS, HIDDEN])


def _stack(name: str) -> str:
    return "encoder.layer" if name in ("bert", "mpnet") else "layers"


def test_a_cut_model_shares_its_weights_and_leaves_the_whole_one_alone() -> None:
    model = build("bert")
    before = model.encode(TEXTS)
    small = truncate(model, 2, 8)
    weight = small[0].model.encoder.layer[0].output.dense.weight
    assert weight is model[0].model.encoder.layer[0].output.dense.weight
    assert small.get_embedding_dimension() == 8
    assert model.get_embedding_dimension() == HIDDEN
    assert model[0].model.config.num_hidden_layers == LAYERS
    assert not hasattr(model[0].model.config, "matkv_rungs")
    assert np.array_equal(model.encode(TEXTS), before)


def test_dense_modules_after_pooling_are_part_of_a_size() -> None:
    model = build("bert", modules.Dense(HIDDEN, 24), modules.Normalize())
    found = encode_rungs(model, TEXTS, [(1, 6), (LAYERS, 24)])
    assert np.array_equal(truncate(model, 1, 6).encode(TEXTS), found[1, 6])
    with pytest.raises(SizeError, match=r"dimension 32 of 1x32 must be in 1\.\.24"):
        truncate(model, 1, HIDDEN)


def test_the_config_says_what_was_trained_and_serves(tmp_path: Path) -> None:
    model = build("bert")
    record(model, [(1, 8), (2, 4), (2, 8), (2, 16), (LAYERS, HIDDEN)], (LAYERS, HIDDEN))
    truncate(model, 2, 8).save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["matkv_rungs"] == [[1, 8], [2, 4], [2, 8]]
    assert config["matryoshka_dimensions"] == [4, 8]
    assert config["num_hidden_layers"] == 2
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert trained_sizes(again) == ((1, 8), (2, 4), (2, 8))
    assert truncate(again, 1, 8).encode(TEXTS).shape == (len(TEXTS), 8)
    with pytest.raises(SizeError, match=r"layer 3 of 3x8 must be in 1\.\.2"):
        truncate(again, 3, 8)


def test_a_size_that_was_never_trained_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = build("bert")
    record(model, [(1, 8), (LAYERS, HIDDEN)], (LAYERS, HIDDEN))
    with caplog.at_level(logging.WARNING, "matkv"):
        truncate(model, 1, 8)
        truncate(model, LAYERS, HIDDEN)
        assert not caplog.records
        truncate(model, 2, 8)
    assert "size 2x8 was never trained (trained: 1x8, 4x32)" in caplog.text


@pytest.mark.parametrize("size", [(0, 8), (5, 8), (1, 0), (1, 33)])
def test_sizes_outside_of_the_model_are_refused(size: tuple[int, int]) -> None:
    model = build("bert")
    with pytest.raises(SizeError, match="must be in 1"):
        truncate(model, *size)
    with pytest.raises(SizeError, match="must be in 1"), truncated(model, *size):
        pass


def test_a_context_gives_the_model_back_after_an_error() -> None:
    model = build("modernbert")
    model.truncate_dim = 16
    before, config = model.encode(TEXTS), dict(vars(model[0].model.config))
    with pytest.raises(RuntimeError), truncated(model, 1, 8):
        raise RuntimeError
    assert model.truncate_dim == 16
    assert vars(model[0].model.config) == config
    assert np.array_equal(model.encode(TEXTS), before)


def test_depth_alone_can_be_cut_for_a_while() -> None:
    model = build("bert")
    with truncated(model, 2):
        assert model.encode(TEXTS).shape == (len(TEXTS), HIDDEN)
        assert len(model[0].model.encoder.layer) == 2


def test_embeddings_of_no_texts_and_of_unit_length() -> None:
    model = build("bert")
    assert encode_rungs(model, [], [(1, 8)])[1, 8].shape == (0, 8)
    (found,) = encode_rungs(model, TEXTS, [(2, 8)], normalize=True).values()
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0)


def test_prompts_are_put_before_texts_at_every_size() -> None:
    model = build("bert")
    model.prompts = {"query": "find "}
    (found,) = encode_rungs(model, TEXTS, [(2, 8)], prompt_name="query").values()
    assert np.array_equal(found, truncate(model, 2, 8).encode(TEXTS, prompt_name="query"))


def test_shapes_in_half_precision() -> None:
    model = build("bert").bfloat16()
    found: Any = encode_rungs(model, TEXTS, [(1, 8), (LAYERS, HIDDEN)])
    assert found[1, 8].dtype == np.float32
    small = truncate(model, 1, 8).encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(small.float(), torch.tensor(found[1, 8]))
