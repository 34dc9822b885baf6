"""Weights that are packed in few bits or kept elsewhere: read by what their maps do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import matkv
from matkv.artifact.lora import DOWN, UP, Lora
from matkv.errors import UnsupportedModelError
from matkv.hf.attach import attachment_of
from matkv.hf.geometry import attention_modules
from matkv.hf.weights import fingerprint, is_plain, output_projection, weight_of
from tiny import COMMON, Tiny, build, from_config, greedy, largest_difference, tokens

IDS = tokens(1, 14)
TEXT = [tokens(4, 48, seed=7)]
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Packed(nn.Module):
    """A linear map in 8 bits: codes in one column, as packages of quantization keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight: Tensor = nn.Parameter(codes.flatten()[:, None], requires_grad=False)
        self.bias = linear.bias

    @property
    def unpacked(self) -> Tensor:
        return self.weight.view(self.out_features, self.in_features).float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked, self.bias)


def packed(family: str) -> tuple[Any, Any]:
    """A model with packed weights in its attention, and its like with these weights unpacked."""
    model, twin = build(family), build(family)
    for module, other in zip(attention_modules(model), attention_modules(twin), strict=True):
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                small = Packed(linear)
                setattr(module, name, small)
                other.get_parameter(f"{name}.weight").data.copy_(small.unpacked)
    return model, twin


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3", "gpt_neox"])
@torch.no_grad()
def test_packed_weights_are_those_that_they_stand_for(family: str) -> None:
    model, twin = packed(family)
    for module, other in zip(attention_modules(model), attention_modules(twin), strict=True):
        small, linear = output_projection(module), output_projection(other)
        assert is_plain(linear) and not is_plain(small)
        seen = weight_of(small, torch.float32)
        assert largest_difference(seen, weight_of(linear, torch.float32)) < 1e-6
    assert fingerprint(model) == pytest.approx(fingerprint(twin), abs=1e-6)
    mine, theirs = matkv.calibrate(model, TEXT), matkv.calibrate(twin, TEXT)
    for layer, sides in mine.bases.items():
        for side, bases in sides.items():
            energy_GD = theirs.bases[layer][side].energy_GD
            assert largest_difference(bases.energy_GD, energy_GD) < 1e-4
    matkv.attach(model, theirs, 0.5)
    matkv.attach(twin, theirs, 0.5)
    assert largest_difference(model(IDS).logits, twin(IDS).logits) < 1e-5
    assert torch.equal(greedy(model, IDS), greedy(twin, IDS))


def test_adapters_do_not_go_into_packed_weights(llama: Tiny) -> None:
    model, _ = packed("llama")
    artifact, name = matkv.calibrate(model, TEXT), "model.layers.0.self_attn.q_proj"
    tensors = {
        f"base_model.model.{name}{DOWN}": torch.ones(1, 64),
        f"base_model.model.{name}{UP}": torch.ones(64, 1),
    }
    plain = model(IDS).logits
    with pytest.raises(UnsupportedModelError, match="are packed or offloaded"):
        matkv.attach(model, replace(artifact, lora=Lora({"r": 1, "lora_alpha": 1}, tensors)), 0.5)
    assert attachment_of(model) is None
    assert torch.equal(model(IDS).logits, plain)


# ---- offloaded by accelerate


def to_disk(model: Any) -> Any:
    from accelerate import disk_offload

    return disk_offload(model, tempfile.mkdtemp(), execution_device="cpu")


def to_ram(model: Any) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device="cpu")


def one_layer(model: Any) -> Any:
    from accelerate import dispatch_model

    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*parts, *(f"model.layers.{n}" for n in range(3))], "cpu")
    places["model.layers.1"] = "disk"
    return dispatch_model(model, places, offload_dir=tempfile.mkdtemp(), main_device="cpu")


# Before 5.23, transformers takes offloaded models to be on the meta device.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("offload", [to_ram, to_disk, one_layer])
@torch.no_grad()
def test_offloaded_weights_are_brought_when_needed(
    llama: Tiny, offload: Callable[[Any], Any]
) -> None:
    model = offload(build("llama"))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    made = matkv.calibrate(model, TEXT)
    assert made.fingerprint == llama.artifact.fingerprint
    for layer, sides in made.bases.items():
        for side, bases in sides.items():
            assert torch.equal(bases.maps.encode_XDD, llama.artifact.maps(layer, side).encode_XDD)
    matkv.attach(model, llama.artifact, ranks=llama.ragged(), sink=2, recent=3)
    expected = llama.attach(ranks=llama.ragged(), sink=2, recent=3)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert torch.equal(greedy(model, IDS), greedy(expected, IDS))
    held = [
        x for module in attention_modules(model) for x in module.get_submodule("matkv").buffers()
    ]
    assert {buffer.device.type for buffer in held} == {"cpu"}
    matkv.detach(model)
    assert torch.equal(model(IDS).logits, matkv.detach(llama.model)(IDS).logits)


# ---- packages of quantization, where they are installed


def saved() -> str:
    folder = tempfile.mkdtemp()
    config = transformers.LlamaConfig(**COMMON | {"intermediate_size": 128})
    from_config(config).save_pretrained(folder)
    return folder


def by_bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    quantization = transformers.BitsAndBytesConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(
        saved(), quantization_config=quantization
    )


def by_torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    how = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return transformers.AutoModelForCausalLM.from_pretrained(
        saved(), dtype=torch.bfloat16, quantization_config=how
    )


def by_quanto() -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    model = build("llama")
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    return model


PACKAGES: dict[str, Callable[[], Any]] = {
    "bitsandbytes, 4 bits": lambda: by_bitsandbytes(load_in_4bit=True),
    "bitsandbytes, 8 bits": lambda: by_bitsandbytes(load_in_8bit=True),
    "torchao": by_torchao,
    "quanto": by_quanto,
}


@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("package", PACKAGES)
@torch.no_grad()
def test_packages_of_quantized_weights_work(package: str) -> None:
    model = PACKAGES[package]()
    model(IDS)  # bitsandbytes packs once more when it is first used
    plain = model(IDS).logits
    artifact = matkv.calibrate(model, TEXT)
    matkv.attach(model, artifact, 1.0)
    assert largest_difference(model(IDS).logits, plain) < 0.03 * float(plain.abs().max())
    matkv.attach(model, artifact, 0.25)
    out = model(IDS)
    assert any(isinstance(value, matkv.LatentCache) for value in out.values())
    assert greedy(model, IDS, 4).shape == (1, 18)
    assert torch.equal(matkv.detach(model)(IDS).logits, plain)
