"""What a short try, a config or the first batch shows to be unfit for latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import matkv
from matkv.errors import DataError, UnsupportedModelError
from matkv.hf.geometry import geometry_of
from matkv.hf.observe import collect_moments
from matkv.hf.probe import check_attends
from tiny import COMMON, Tiny, build, from_config, greedy, tokens

IDS = tokens(1, 6)
MANY_HEADS = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}


# ---- a short try


def test_every_family_passes(any_family: Tiny) -> None:
    check_attends(any_family.model)


def test_a_family_that_takes_all_of_itself_for_its_decoder_is_refused() -> None:
    layers = ["full_attention"] * COMMON["num_hidden_layers"]
    sizes: dict[str, Any] = {"num_local_experts": 2, "intermediate_size_mlp": 32}
    config = transformers.Llama4TextConfig(**COMMON, **sizes, layer_types=layers)
    model = from_config(config)
    assert model.get_decoder() is model
    with pytest.raises(UnsupportedModelError, match="llama4_text does not tell its decoder"):
        matkv.calibrate(model, [IDS])


def test_a_family_that_splits_its_keys_is_refused() -> None:
    model = from_config(transformers.DiffLlamaConfig(**COMMON))
    read: list[Any] = []

    def reading() -> Iterator[Any]:
        read.append(IDS)
        yield IDS

    with pytest.raises(UnsupportedModelError, match="does more with keys and values than attend"):
        matkv.calibrate(model, reading())
    assert not read
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_is_off_on_latents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that asks its cache for more than keys and values, and goes on without."""
    model = build("llama")
    layer = model.model.layers[1]
    forward = layer.self_attn.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out, weights = forward(*args, **kwargs)
        cache = next((x for x in kwargs.values() if isinstance(x, transformers.Cache)), None)
        return out if cache is None else 2 * out, weights

    monkeypatch.setattr(layer.self_attn, "forward", scaled)
    with pytest.raises(UnsupportedModelError, match="on latents of full rank is off by"):
        matkv.calibrate(model, [IDS])


# ---- attention weights, which latents do not give

SILENT: dict[str, Callable[[], Any]] = {
    "opt": lambda: transformers.OPTConfig(**MANY_HEADS, ffn_dim=96, word_embed_proj_dim=64),
    "nemotron": lambda: transformers.NemotronConfig(**COMMON, head_dim=16),
    "persimmon": lambda: transformers.PersimmonConfig(**MANY_HEADS),
}


@pytest.mark.parametrize("family", SILENT)
def test_attention_weights_are_refused_where_transformers_gives_none(family: str) -> None:
    model = from_config(SILENT[family]())
    matkv.attach(model, matkv.calibrate(model, [tokens(2, 16)]), 0.5)
    for act in (
        lambda: model(IDS, output_attentions=True),
        lambda: greedy(model, IDS, 2, output_attentions=True, return_dict_in_generate=True),
    ):
        with pytest.raises(UnsupportedModelError, match="output_attentions=True"):
            act()


# ---- configs


def heterogeneous(**own: int) -> Any:
    config = transformers.LlamaConfig(**COMMON, head_dim=16)
    config.per_layer_config = {1: own}
    return config


def test_attributes_that_differ_by_layer_are_the_layers_own() -> None:
    pytest.importorskip("transformers.integrations.heterogeneity")
    shapes = geometry_of(heterogeneous(num_key_value_heads=1)).layers
    assert [shape.kv_heads for shape in shapes] == [2, 1, 2]
    shapes = geometry_of(heterogeneous(head_dim=32)).layers
    assert [shape.head_dim for shape in shapes] == [16, 32, 16]
    with pytest.raises(UnsupportedModelError, match="one number of attention heads"):
        geometry_of(heterogeneous(num_attention_heads=2))


def test_a_layer_of_unknown_kind_is_refused() -> None:
    config = transformers.LlamaConfig(**COMMON)
    config.layer_types = ["full_attention", "an oracle", "full_attention"]
    with pytest.raises(UnsupportedModelError, match="an oracle"):
        geometry_of(config)


# ---- numbers that are none


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_moments_that_are_not_finite_name_the_layer_at_once(name: str) -> None:
    model = build("llama").half()
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, name).weight.fill_(6e4)
    batches = iter([IDS] * 5)
    with pytest.raises(UnsupportedModelError, match="layer 1 has queries, keys or values that"):
        matkv.calibrate(model, batches)
    assert len(list(batches)) == 4


def test_an_output_projection_that_is_not_finite_is_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[0, 0] = torch.inf
    with pytest.raises(UnsupportedModelError, match="layer 2 has output projection"):
        collect_moments(model, [IDS])


# ---- what is no text


@pytest.mark.parametrize(
    "batches",
    [["text"], "text", [[1, 2]], [{"ids": IDS}], [IDS[0]], [IDS.float()], IDS, 7, None],
    ids=str,
)
def test_what_holds_no_token_ids_is_refused(llama: Tiny, batches: Any) -> None:
    with pytest.raises(DataError, match="give"):
        matkv.calibrate(llama.model, batches)


@pytest.mark.parametrize("shift", [-1000, 1000])
def test_token_ids_of_another_tokenizer_are_refused(llama: Tiny, shift: int) -> None:
    with pytest.raises(DataError, match="are not all of the model's 96"):
        matkv.calibrate(llama.model, [IDS + shift])


def test_an_artifact_may_be_given_by_its_path(llama: Tiny, tmp_path: Any) -> None:
    run = llama.artifact.save(tmp_path / "run")
    expected = llama.attach(budget=0.5)(IDS).logits
    for path in (run, str(run)):
        matkv.attach(llama.model, path, 0.5)
        assert torch.equal(llama.model(IDS).logits, expected)
        with matkv.attached(llama.model, path, 0.5) as model:
            assert torch.equal(model(IDS).logits, expected)
    for wrong, message in ((tmp_path / "none", "no artifact at"), (3, "is needed, not '3'")):
        with pytest.raises(matkv.ArtifactError, match=message):
            matkv.attach(llama.model, wrong, 0.5)  # type: ignore[arg-type]


def test_a_module_without_a_map_after_its_attention_is_named() -> None:
    from matkv.hf.weights import output_projection

    with pytest.raises(UnsupportedModelError, match="o_proj, dense or out_proj"):
        output_projection(nn.Identity())
