"""One attachment, whatever wraps the model: found, moved, copied and undone from everywhere."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import matkv
from matkv.artifact.lora import DOWN, UP, Lora
from matkv.cache.naming import cache_name
from matkv.errors import UnsupportedModelError
from matkv.hf.attach import attachment_of
from tiny import COMMON, Tiny, build, greedy, seeded, tokens

IDS = tokens(1, 14)


class Parallel(nn.Module):
    """As DistributedDataParallel: the model is in `module`, and nothing else is handed on."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def adapted(model: Any) -> Any:
    from peft import LoraConfig

    return tuned(model, LoraConfig(target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))


def tuned(model: Any, settings: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by a name that it has deprecated.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, settings).eval()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "decoder": lambda model: model.model,
    "peft": adapted,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "parallel": Parallel,
}


def held(out: Any) -> Any:
    return next(x for x in out.values() if isinstance(x, DynamicCache | matkv.LatentCache))


def is_latent(model: Any) -> bool:
    return isinstance(held(model(IDS)), matkv.LatentCache)


def pair_of_weights(subject: Tiny) -> tuple[str, Lora]:
    """Adapters on one map, large enough to be seen."""
    name = "model.layers.1.self_attn.q_proj"
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 64), (64, 2)))
    paths = {f"base_model.model.{name}{DOWN}": down, f"base_model.model.{name}{UP}": up}
    return f"{name}.weight", Lora({"r": 2, "lora_alpha": 2}, paths)


# ---- attach here, detach there


@pytest.mark.parametrize("first", WRAPPERS)
@pytest.mark.parametrize("second", WRAPPERS)
@torch.no_grad()
def test_attached_by_one_it_is_detached_by_another(llama: Tiny, first: str, second: str) -> None:
    model = build("llama")
    plain = model(IDS).logits
    one = WRAPPERS[first](model)
    assert matkv.attach(one, llama.artifact, 0.25) is one
    other = one if second == first else WRAPPERS[second](model)
    assert attachment_of(one) is attachment_of(other) is attachment_of(model) is not None
    assert is_latent(model)
    matkv.attach(other, llama.artifact, 0.5)
    assert matkv.detach(one) is one
    assert attachment_of(model) is None
    assert torch.equal(model(IDS).logits, plain)
    assert not is_latent(model)
    assert not any(hasattr(module, "matkv") for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert "_prepare_cache_for_generation" not in vars(model) | vars(model.model)


@torch.no_grad()
def test_a_compiled_model_follows_attach_and_detach(llama: Tiny) -> None:
    model = build("llama")
    compiled: Any = torch.compile(model, backend="eager")
    plain = compiled(IDS).logits
    matkv.attach(compiled, llama.artifact, 0.25)
    out = compiled(IDS)
    assert isinstance(held(out), matkv.LatentCache)
    assert torch.equal(out.logits, model(IDS).logits)
    matkv.detach(model)
    assert torch.equal(compiled(IDS).logits, plain)


def test_a_wrapped_model_is_calibrated_and_generates(llama: Tiny) -> None:
    wrapped = adapted(build("llama"))
    artifact = matkv.calibrate(wrapped, [tokens(4, 48, seed=7)])
    assert artifact.fingerprint == llama.artifact.fingerprint
    with matkv.attached(wrapped, artifact, 0.5) as same:
        assert same is wrapped
        assert greedy(wrapped, IDS, 3, attention_mask=torch.ones_like(IDS)).shape == (1, 17)
        assert is_latent(wrapped)
    assert not is_latent(wrapped)


def test_what_is_no_model_is_refused(llama: Tiny) -> None:
    for act in (
        lambda: matkv.attach("llama", llama.artifact, 0.5),  # type: ignore[type-var]
        lambda: matkv.attach(nn.Linear(2, 2), llama.artifact, 0.5),
        lambda: matkv.detach("llama"),  # type: ignore[type-var]
        lambda: matkv.calibrate("llama", [IDS]),  # type: ignore[arg-type]
    ):
        with pytest.raises(UnsupportedModelError, match="is no model of transformers"):
            act()


def test_detach_works_after_the_config_was_changed(llama: Tiny) -> None:
    model = build("llama")
    matkv.attach(model, llama.artifact, 0.5)
    model.config.num_hidden_layers = 2
    matkv.detach(model)
    model.config.num_hidden_layers = 3
    assert model.config._attn_implementation == "sdpa"
    assert not is_latent(model)


def test_a_detach_that_was_cut_off_is_finished_by_another(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    plain = model(IDS).logits
    matkv.attach(model, llama.artifact, 0.25)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transformers.LlamaModel, "get_submodule", interrupted)
        matkv.detach(model)
    assert attachment_of(model) is not None
    matkv.detach(model)
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("recent", [0, 3])
def test_early_exit_drafts_the_same_tokens(llama: Tiny, recent: int) -> None:
    model = build("llama")
    ids, options = tokens(1, 9, seed=4).repeat(1, 3), {"assistant_early_exit": 2}
    expected = greedy(model, ids, 8, **options)
    matkv.attach(model, llama.artifact, 1.0, recent=recent)
    assert torch.equal(greedy(model, ids, 8, **options), expected)
    matkv.attach(model, llama.artifact, 0.5, recent=recent)
    assert torch.equal(greedy(model, ids, 8, **options), greedy(model, ids, 8))


def test_prefix_tuning_is_refused_and_prompt_tuning_works(llama: Tiny) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig

    for settings, is_refused in ((PrefixTuningConfig, True), (PromptTuningConfig, False)):
        model = build("llama")
        wrapped = tuned(model, settings(task_type="CAUSAL_LM", num_virtual_tokens=4))
        expected = wrapped(input_ids=IDS).logits
        matkv.attach(wrapped, llama.artifact, 1.0)
        if is_refused:
            with pytest.raises(matkv.CacheError, match="cannot take latents"):
                wrapped(input_ids=IDS)
        else:
            torch.testing.assert_close(wrapped(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


# ---- composite models


def with_pictures() -> Any:
    text = COMMON | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90
    )
    with seeded(0):
        return transformers.Gemma3ForConditionalGeneration(config).eval()


@torch.no_grad()
def test_a_composite_model_keeps_the_attention_of_its_other_parts() -> None:
    model = with_pictures()
    model.model.vision_tower.set_attn_implementation("eager")

    def implementations() -> list[str]:
        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        return [str(part.config._attn_implementation) for part in parts]

    ids, before = IDS.clamp_max(80), implementations()
    plain = model(ids).logits
    artifact = matkv.calibrate(model, [tokens(2, 24).clamp_max(80)])
    assert implementations() == before
    matkv.attach(model.model.language_model, artifact, 1.0)
    assert implementations() == [*before[:-1], "matkv"]
    assert "eager" in before
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-5)
    matkv.detach(model)
    assert implementations() == before
    assert torch.equal(model(ids).logits, plain)


# ---- copies and files


@torch.no_grad()
def test_a_pickled_attached_model_stays_attached(llama: Tiny) -> None:
    model = build("llama")
    matkv.attach(model, llama.artifact, ranks=llama.ragged(), sink=2)
    expected, out = model(IDS).logits, greedy(model, IDS)
    twin = pickle.loads(pickle.dumps(model))
    matkv.detach(model)
    assert torch.equal(twin(IDS).logits, expected)
    assert torch.equal(greedy(twin, IDS), out)
    assert torch.equal(matkv.detach(twin)(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_a_saved_attached_model_loads_in_a_new_process(llama: Tiny, tmp_path: Path) -> None:
    model = build("llama")
    matkv.attach(model, llama.artifact, 0.25)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(IDS).logits, tmp_path / "logits.pt")
    script = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
ids = torch.tensor({IDS.tolist()})
with torch.no_grad():
    out = model(ids)
assert [type(x).__name__ for x in out.values()][-1] == "LatentCache"
torch.testing.assert_close(out.logits, torch.load({str(tmp_path / "logits.pt")!r}))
model.generate(ids, max_new_tokens=2)
import matkv
assert matkv.detach(model).config._attn_implementation == "sdpa"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("wrapped_later", [False, True])
@torch.no_grad()
def test_what_is_saved_meanwhile_is_the_models_own(
    llama: Tiny, tmp_path: Path, wrapped_later: bool
) -> None:
    model = build("llama")
    own = {name: weight.clone() for name, weight in model.state_dict().items()}
    path, lora = pair_of_weights(llama)
    matkv.attach(model, replace(llama.artifact, lora=lora), 0.5)
    assert not torch.equal(model.get_parameter(path), own[path])
    model.save_pretrained(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for state in (saved, model.state_dict()):
        assert list(state) == list(own)
        assert all(torch.equal(state[name], own[name]) for name in own)
    matkv.detach(adapted(model) if wrapped_later else model)
    module = model.model.layers[1].self_attn.q_proj
    assert torch.equal(getattr(module, "base_layer", module).weight, own[path])
    assert not module._state_dict_hooks


def test_adapters_for_what_a_model_lacks_are_refused(llama: Tiny) -> None:
    model, (path, lora) = build("llama"), pair_of_weights(llama)
    tensors = {name.replace("q_proj", "qkv_proj"): x for name, x in lora.tensors.items()}
    with pytest.raises(UnsupportedModelError, match=r"has no .*qkv_proj, which has an adapter"):
        matkv.attach(model, replace(llama.artifact, lora=replace(lora, tensors=tensors)), 0.5)
    assert attachment_of(model) is None
    assert not is_latent(model)
    matkv.attach(model.model, replace(llama.artifact, lora=lora), 0.5)  # the decoder alone
    assert not torch.equal(model.get_parameter(path), llama.model.get_parameter(path))


# ---- how the decoder is called


@torch.no_grad()
def test_arguments_by_position_are_those_by_name(llama: Tiny) -> None:
    model = build("llama")
    matkv.attach(model, llama.artifact, 0.5, sink=2)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    named = model.model(input_ids=IDS, attention_mask=mask).last_hidden_state
    assert torch.equal(model.model(IDS, mask).last_hidden_state, named)
    cache = DynamicCache(config=model.config)
    model.model(IDS, mask, None, cache)
    assert {type(layer).__name__ for layer in cache.layers} == {"LatentLayer"}
    with pytest.raises(TypeError, match="input_ids"):
        model.model(IDS, input_ids=IDS)


class Forgetful(transformers.LlamaModel):
    """A decoder of another version: it calls its cache by a name that nobody knows."""

    def forward(self, input_ids: Any = None, state: Any = None, **kwargs: Any) -> Any:
        kwargs.pop(cache_name(transformers.LlamaModel.forward), None)
        given = {} if state is None else {cache_name(transformers.LlamaModel.forward): state}
        return super().forward(input_ids=input_ids, **given, **kwargs)


@torch.no_grad()
def test_a_cache_filled_without_latents_is_an_error_at_once(llama: Tiny) -> None:
    model = build("llama")
    matkv.attach(model, llama.artifact, 0.25)
    model.model.__class__ = Forgetful
    with pytest.raises(matkv.CacheError, match="filled a DynamicCache without latents"):
        model(IDS)
    model.model.__class__ = transformers.LlamaModel
    full = DynamicCache(config=model.config)
    forward: Any = model.model.forward  # past the hooks
    name = cache_name(transformers.LlamaModel.forward)
    forward(input_ids=IDS, **{name: full})
    with pytest.raises(matkv.CacheError, match="holds full keys and values"):
        forward(input_ids=IDS[:, :1], **{name: full})
