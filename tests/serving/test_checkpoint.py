"""The fingerprint of a checkpoint is that of the model loaded from it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from matkv.artifact.lora import Lora
from matkv.errors import ArtifactError
from matkv.hf.merge import merged
from matkv.hf.weights import fingerprint as of_model
from matkv.vllm.checkpoint import fingerprint, with_adapters
from one_artifact import adapters_of
from tiny import Tiny, tiny


@pytest.mark.parametrize("shards", ["1MB", "50KB"])
def test_a_checkpoint_is_recognized(any_family: Tiny, tmp_path: Path, shards: str) -> None:
    any_family.model.save_pretrained(tmp_path, max_shard_size=shards)
    found = fingerprint(str(tmp_path), any_family.model.config)
    assert found == of_model(any_family.model)
    any_family.artifact.check(any_family.geometry, found)


def test_the_default_dtype_does_not_matter(tmp_path: Path) -> None:
    model = tiny("llama").model
    model.save_pretrained(tmp_path)
    wanted, before = of_model(model), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as vLLM does
        found = fingerprint(str(tmp_path), model.config)
        assert found == wanted == of_model(model)
        tiny("llama").artifact.check(tiny("llama").geometry, found)
    finally:
        torch.set_default_dtype(before)


def test_names_may_lack_what_comes_before_the_layers(tmp_path: Path) -> None:
    model = tiny("llama").model
    model.model.save_pretrained(tmp_path)
    assert fingerprint(str(tmp_path), model.config) == of_model(model)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    model = tiny("llama").model
    with pytest.raises(ArtifactError, match="save_pretrained"):
        fingerprint(str(tmp_path), model.config)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    del known["weight_map"]["model.layers.1.self_attn.q_proj.weight"]
    other = tmp_path / "other"
    model.save_pretrained(other, max_shard_size="50KB")
    (other / index.name).write_text(json.dumps(known))
    with pytest.raises(ArtifactError, match=r"no tensor model\.layers\.1\.self_attn"):
        fingerprint(str(other), model.config)
    config = type(model.config)(quantization_config={"quant_method": "fp8"})
    with pytest.raises(ArtifactError, match="is quantized"):
        fingerprint(str(tmp_path), config)


def test_rounding_is_that_of_the_artifact() -> None:
    model = tiny("llama").model
    assert all(round(one, 7) == one for one in of_model(model))
    assert len(of_model(model)) == 3 * 8
    assert torch.tensor(of_model(model)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_adapters_are_added_as_in_transformers(dtype: torch.dtype, prefix: str) -> None:
    """To a checkpoint whose names may lack what comes before the layers."""
    model = copy.deepcopy(tiny("llama").model).to(dtype)
    lora = adapters_of(model, ("q_proj", "o_proj", "up_proj"))
    stored = {name: one.clone() for name, one in model.named_parameters()}
    named = ((name.removeprefix(prefix), one.float()) for name, one in stored.items())
    found = dict(with_adapters(named, lora, dtype))
    changed = 0
    with merged(model, lora):
        for name, wanted in model.named_parameters():
            got = found.pop(name.removeprefix(prefix))
            changed += not torch.equal(wanted, stored[name])
            assert torch.equal(got.to(dtype), wanted)
    assert not found and changed == len(lora.paths) == 9


@pytest.mark.parametrize("names", [("q_proj",), ("o_proj", "nowhere")])
def test_adapters_of_another_model_are_refused(names: tuple[str, ...]) -> None:
    model = tiny("llama").model
    lora = adapters_of(model, names)
    weights = [(name, one[:-1]) for name, one in model.named_parameters()]
    if "nowhere" in names:
        odd = {name.replace("o_proj", "nowhere"): one for name, one in lora.tensors.items()}
        lora, weights = Lora(lora.config, odd), list(model.named_parameters())
    with pytest.raises(ArtifactError, match="another model's"):
        list(with_adapters(weights, lora, torch.float32))
