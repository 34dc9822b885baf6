"""Backbones are found, cut and given back without a table of architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import Tensor, nn

from matkv.embeddings import encode_rungs, truncate
from matkv.embeddings.depth import apply_cut, backbone_of, cut, evaluating, recording
from matkv.errors import MatkvError, UnsupportedModelError
from tiny_embedders import ARCHITECTURES, HIDDEN, LAYERS, MORE, TEXTS, build

PRE_NORM = {"modernbert", "qwen3", "gemma3", "t5", "llama", "mistral"}


# DeBERTa's module compiles with torch.jit in older versions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_layers_and_final_norm_are_found(name: str) -> None:
    found = backbone_of(build(name))
    assert found.layers == LAYERS
    assert (not isinstance(found.norm, nn.Identity)) == (name in PRE_NORM)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_a_cut_model_gives_what_the_whole_one_has_at_that_depth(name: str) -> None:
    model = build(name)
    found = encode_rungs(model, TEXTS, [(1, 8), (3, 16), (LAYERS, HIDDEN)])
    for (layer, dim), embeddings in found.items():
        assert (truncate(model, layer, dim).encode(TEXTS) == embeddings).all()


def test_a_cut_ends_with_its_block_even_after_an_error() -> None:
    model = build("gemma3")
    backbone = backbone_of(model)
    stack, types = backbone.stack, list(backbone.config.layer_types)
    with pytest.raises(RuntimeError), cut(backbone, 2):
        assert backbone.layers == backbone.config.num_hidden_layers == 2
        assert backbone.config.layer_types == types[:2]
        raise RuntimeError
    assert backbone.stack is stack
    assert backbone.config.num_hidden_layers == LAYERS
    assert backbone.config.layer_types == types


def test_recording_ends_with_its_block_even_after_an_error() -> None:
    backbone = backbone_of(build("bert"))
    before = backbone.config.output_hidden_states
    with pytest.raises(RuntimeError), recording(backbone, [1, 3]):
        assert backbone.layers == 3
        assert backbone.config.output_hidden_states
        raise RuntimeError
    assert (backbone.layers, backbone.config.output_hidden_states) == (LAYERS, before)


def test_finding_layers_leaves_every_mode_as_it_was() -> None:
    model = build("bert").train()
    frozen = model[0].model.embeddings
    frozen.eval()
    backbone_of(model)
    assert model.training
    assert model[1].training
    assert not frozen.training
    with evaluating(model):
        assert not model.training


def test_more_than_a_norm_after_the_last_layer_is_refused() -> None:
    model = build("bert")

    def more(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    model[0].model.encoder.register_forward_hook(more)
    with pytest.raises(UnsupportedModelError, match="does more after its last layer than a norm"):
        backbone_of(model)


def test_a_backbone_that_cannot_read_short_texts_is_refused_in_one_line() -> None:
    model = build("bert")

    def fail(module: nn.Module, inputs: Any) -> None:
        raise ValueError("shape [4, 8] is invalid\nand more")

    model[0].model.encoder.register_forward_pre_hook(fail)
    with pytest.raises(UnsupportedModelError, match=r"short texts: shape \[4, 8\] is invalid$"):
        backbone_of(model)


def test_layers_that_know_how_many_there_are_cannot_be_cut() -> None:
    model = build("bert")
    model[0].model.encoder.register_forward_pre_hook(_shift)
    with pytest.raises(UnsupportedModelError, match="give something else"):
        backbone_of(model)


def _shift(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make the states depend on how many layers follow."""
    states, *rest = inputs
    assert isinstance(states, Tensor)
    return (states * len(module.layer), *rest)


def _static() -> SentenceTransformer:
    tokenizer = build("bert").tokenizer
    static = modules.StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=8)
    return SentenceTransformer(modules=[static], device="cpu")


def _all_layers() -> SentenceTransformer:
    model = build("bert")
    pooled = modules.WeightedLayerPooling(HIDDEN, num_hidden_layers=LAYERS)
    return SentenceTransformer(modules=[model[0], pooled, model[1]], device="cpu")


def _router() -> SentenceTransformer:
    model = build("bert")
    router = modules.Router.for_query_document([model[0]], [model[0]])
    return SentenceTransformer(modules=[router, model[1]], device="cpu")


def _no_count() -> SentenceTransformer:
    model = build("bert")
    model[0].model.config.__dict__["num_hidden_layers"] = None
    return model


REFUSED = {
    "static": (_static, "starts with StaticEmbedding"),
    "router": (_router, "starts with Router"),
    "weighted layers": (_all_layers, "pools all its layers"),
    "albert": (lambda: build("albert"), "layers that share their weights"),
    "no number of layers": (_no_count, "does not say how many layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_without_layers_to_cut_are_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        backbone_of(make())


def test_clip_is_refused() -> None:
    model = build("bert")
    model[0].module_output_name = "sentence_embedding"  # how image-text models answer
    with pytest.raises(MatkvError, match="sizes need a text transformer with pooling"):
        backbone_of(model)


def test_cutting_twice_is_cutting_once() -> None:
    model = build("qwen3")
    backbone = backbone_of(model)
    apply_cut(backbone, 3)
    assert backbone_of(model).layers == 3
    assert torch.equal(
        torch.tensor(truncate(model, 2, 16).encode(TEXTS)),
        torch.tensor(truncate(build("qwen3"), 2, 16).encode(TEXTS)),
    )
