"""The seam with transformers: attach and detach, and everything that is refused."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
from transformers.cache_utils import DynamicCache, StaticCache

import matkv
from matkv.cache.cache import StaticLatentCache
from matkv.cache.layer import LatentLayer
from matkv.errors import (
    BudgetError,
    CacheError,
    FingerprintError,
    MatkvError,
    RankError,
    UnsupportedModelError,
)
from matkv.hf.attach import attached_table
from matkv.hf.function import attention_forward, register
from matkv.ranks import Geometry, RankTable
from tiny import (
    COMMON,
    Tiny,
    build,
    from_config,
    greedy,
    latent_layers,
    seeded,
    stepwise,
    tiny,
    tokens,
)

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def picture(model: Any) -> dict[str, Any]:
    """Everything about a model that attaching might change."""
    return {
        "state": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "buffers": [name for name, _ in model.named_buffers()],
        "hooks": [len(getattr(m, hooks)) for m in model.modules() for hooks in HOOKS],
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "training": [module.training for module in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
    }


# ---- attach and detach


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_detach_leaves_the_model_exactly_as_it_was(any_family: Tiny, implementation: str) -> None:
    model, ids = any_family.model, tokens(2, 14)
    model.set_attn_implementation(implementation)
    try:
        before, logits = picture(model), model(ids).logits
        any_family.attach(ranks=any_family.ragged())
        any_family.attach(budget=0.5, sink=2)  # attaching twice is one attachment
        assert picture(model) != before
        greedy(model, ids, 3)
        assert matkv.detach(model) is model
        assert picture(model) == before
        assert torch.equal(model(ids).logits, logits)
        assert matkv.detach(model) is model
        assert picture(model) == before
    finally:
        model.set_attn_implementation("sdpa")


def test_attaching_adds_nothing_to_what_is_saved(llama: Tiny) -> None:
    before = list(llama.model.state_dict())
    llama.attach(budget=0.5)
    assert list(llama.model.state_dict()) == before


@torch.no_grad()
def test_attaching_again_replaces_the_ranks(llama: Tiny) -> None:
    ids = tokens(1, 10)
    expected = llama.attach(budget=0.25)(ids).logits
    llama.attach(budget=0.75)
    assert attached_table(llama.model).budget == 0.75
    llama.attach(budget=0.25)
    assert attached_table(llama.model).budget == 0.25
    assert torch.equal(llama.model(ids).logits, expected)


def test_an_error_in_attach_leaves_the_model_attached_as_it_was(llama: Tiny) -> None:
    llama.attach(budget=0.25)
    before = picture(llama.model)
    with pytest.raises(BudgetError):
        llama.attach(budget=1.5)
    assert picture(llama.model) == before
    assert attached_table(llama.model).budget == 0.25


@torch.no_grad()
def test_a_copy_of_an_attached_model_stands_alone(llama: Tiny) -> None:
    model, ids = llama.attach(ranks=llama.ragged(), sink=2), tokens(1, 10)
    expected, tokens_out = model(ids).logits, greedy(model, ids)
    twin = copy.deepcopy(model)
    matkv.detach(model)
    assert torch.equal(twin(ids).logits, expected)
    assert torch.equal(greedy(twin, ids), tokens_out)
    before = picture(matkv.detach(twin))
    assert before == picture(model)


@torch.no_grad()
def test_an_attached_model_can_change_its_dtype(llama: Tiny) -> None:
    model = copy.deepcopy(llama.model)
    matkv.attach(model, llama.artifact, 0.5)
    half = model.to(torch.bfloat16)(tokens(1, 8))
    assert half.logits.dtype == torch.bfloat16
    assert {b.dtype for b in half.past_key_values.layers[0].buffers} == {torch.bfloat16}


def test_the_artifacts_exact_tokens_are_the_default(llama: Tiny) -> None:
    artifact = replace(llama.artifact, sink=3, recent=2)
    matkv.attach(llama.model, artifact, 0.5)
    projection = latent_layers(matkv.LatentCache(llama.model))[0].projection
    assert (projection.sink, projection.recent) == (3, 2)
    matkv.attach(llama.model, artifact, 0.5, sink=0, recent=7)
    projection = latent_layers(matkv.LatentCache(llama.model))[0].projection
    assert (projection.sink, projection.recent) == (0, 7)


def test_the_table_is_that_of_the_attachment(llama: Tiny) -> None:
    with pytest.raises(MatkvError, match="not attached"):
        attached_table(llama.model)
    table = llama.ragged(3)
    llama.attach(ranks=table)
    assert attached_table(llama.model) == table


def test_a_model_in_training_mode_is_compressed_too(llama: Tiny) -> None:
    model = llama.attach(ranks=llama.ragged())
    expected = model(tokens(1, 6)).logits
    model.train()
    try:
        out = model(tokens(1, 6))
    finally:
        model.eval()
    assert isinstance(out.past_key_values, matkv.LatentCache)
    assert torch.equal(out.logits, expected)


# ---- the registries


def test_importing_the_package_changes_nothing_in_transformers() -> None:
    script = """
import transformers
from transformers import AttentionInterface as A, AttentionMaskInterface as M
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as D
names = lambda: (set(A()), set(M()), dict(D), transformers.PreTrainedModel.forward
                 if hasattr(transformers.PreTrainedModel, "forward") else None)
before = names()
import matkv
assert names() == before
from matkv.hf import register
register(); register()
assert names()[0] - before[0] == names()[1] - before[1] == {"matkv"}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_register_may_be_called_twice() -> None:
    register()
    functions = AttentionInterface()["matkv"], AttentionMaskInterface()["matkv"]
    register()
    assert (AttentionInterface()["matkv"], AttentionMaskInterface()["matkv"]) == functions


# ---- bad input


@pytest.mark.parametrize("budget", [0, -1, 1.5, math.nan, "0.5"])
def test_a_budget_out_of_range_is_refused(llama: Tiny, budget: Any) -> None:
    with pytest.raises(BudgetError, match=f"budget {budget} must be in"):
        llama.attach(budget=budget)
    assert llama.model.config._attn_implementation == "sdpa"


def test_a_budget_and_ranks_exclude_one_another(llama: Tiny) -> None:
    both: dict[str, Any] = {"budget": 0.5, "ranks": llama.ragged()}
    for options in ({}, both):
        with pytest.raises(RankError, match="either a budget or a rank table"):
            matkv.attach(llama.model, llama.artifact, **options)


def test_a_table_for_another_geometry_is_refused(llama: Tiny) -> None:
    fewer = Geometry(query_heads=4, layers=llama.geometry.layers[1:])
    with pytest.raises(RankError, match="another model's geometry"):
        llama.attach(ranks=RankTable.full(fewer))


@pytest.mark.parametrize("options", [{"sink": -1}, {"recent": -2}])
def test_a_negative_number_of_exact_tokens_is_refused(llama: Tiny, options: Any) -> None:
    with pytest.raises(RankError, match="must be a number of tokens"):
        llama.attach(**options)


def test_an_artifact_of_another_model_is_refused(llama: Tiny) -> None:
    with pytest.raises(FingerprintError, match="weights differ"):
        matkv.attach(build("llama", seed=1), llama.artifact, 0.5)
    with pytest.raises(FingerprintError, match="this model has 4 layers, 2 of them compressed"):
        matkv.attach(tiny("gemma3").model, llama.artifact, 0.5)
    matkv.attach(build("llama"), llama.artifact, 0.5)


SMALL = {name: value for name, value in COMMON.items() if name != "tie_word_embeddings"}


def t5() -> Any:
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=2)
    return transformers.T5ForConditionalGeneration(config)


def bert(**options: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        **options,
    )
    return transformers.BertLMHeadModel(config) if options else AutoModel.from_config(config)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**COMMON, head_dim=16, num_local_experts=2)
    return from_config(config)


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **COMMON | {"num_key_value_heads": 4},
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=3,
    )
    return from_config(config)


def all_sliding() -> Any:
    return from_config(transformers.MistralConfig(**COMMON, sliding_window=8))


def gemma2() -> Any:
    return from_config(transformers.Gemma2Config(**COMMON, head_dim=16, sliding_window=8))


def mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2, tie_word_embeddings=False
    )
    return from_config(config)


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)
    return from_config(config)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "softcap": (gemma2, "caps its attention scores"),
    "sinks": (gpt_oss, "learned attention sinks"),
    "MLA": (deepseek, "multi-head latent attention"),
    "encoder-decoder": (t5, "encoder-decoder"),
    "encoder": (bert, "bert"),
    "cross attention": (
        lambda: bert(is_decoder=True, add_cross_attention=True),
        "bert",
    ),
    "every layer slides": (all_sliding, "nothing grows"),
    "state space": (mamba, "mamba"),
    "position bias": (bloom, "does not follow transformers' attention interface"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(llama: Tiny, name: str) -> None:
    make, message = REFUSED[name]
    with seeded(0):
        model = make().eval()
    before = picture(model) if hasattr(model, "generation_config") else None
    with pytest.raises(UnsupportedModelError, match=message):
        matkv.calibrate(model, [tokens(1, 5)])
    with pytest.raises(UnsupportedModelError, match=message):
        matkv.attach(model, llama.artifact, 0.5)
    assert before is None or picture(model) == before


def test_bidirectional_attention_is_refused(llama: Tiny) -> None:
    model = build("llama")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="both directions"):
        matkv.attach(model, llama.artifact, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 30.0},
        {"s_aux": torch.ones(4)},
        {"position_bias": torch.zeros(1)},
        {"is_causal": False},
        {"head_mask": torch.ones(4)},
        {"something_new": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_keyword_that_would_be_ignored_is_refused(options: dict[str, Any]) -> None:
    query = torch.randn(1, 4, 3, 8)
    with pytest.raises(UnsupportedModelError):
        attention_forward(nn.Identity(), query, query, query, None, **options)


@pytest.mark.parametrize("options", [{"softcap": None}, {"is_causal": True}, {"use_cache": True}])
def test_a_keyword_that_changes_nothing_is_taken(options: dict[str, Any]) -> None:
    query = torch.randn(1, 4, 3, 8)
    module = nn.Identity()
    module.is_causal = True  # type: ignore[assignment]
    out, weights = attention_forward(module, query, query, query, None, **options)
    assert out.shape == (1, 3, 4, 8)
    assert weights is None


def test_attention_weights_are_refused(any_family: Tiny) -> None:
    model = any_family.attach(budget=0.5)
    with pytest.raises((UnsupportedModelError, ValueError), match="output_attentions"):
        model(tokens(1, 4), output_attentions=True)
    with pytest.raises((UnsupportedModelError, ValueError), match="output_attentions"):
        greedy(model, tokens(1, 4), 2, output_attentions=True, return_dict_in_generate=True)


# ---- caches that do not fit


def dynamic(model: Any, *, length: int = 0) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    if length:
        with torch.no_grad():
            model(tokens(1, length), past_key_values=cache)
    return cache


def test_an_empty_dynamic_cache_turns_latent(gemma3: Tiny) -> None:
    ids = tokens(1, 20)
    model = gemma3.attach(ranks=gemma3.ragged())
    with torch.no_grad():
        expected = model(ids).logits
    for cache in (dynamic(model), DynamicCache()):
        logits = stepwise(model, ids, (7, 5), cache)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        latent = [n for n, layer in enumerate(cache.layers) if isinstance(layer, LatentLayer)]
        assert tuple(latent) == gemma3.geometry.compressed


def test_a_cache_that_holds_full_keys_is_refused(gemma3: Tiny) -> None:
    full = dynamic(gemma3.model, length=5)
    model = gemma3.attach(budget=0.5)
    for act in (
        lambda: model(tokens(1, 2), past_key_values=full),
        lambda: greedy(model, tokens(1, 7), 2, past_key_values=full),
    ):
        with pytest.raises(CacheError, match="layer 1 of the DynamicCache cannot take latents"):
            act()


@torch.no_grad()
def test_an_empty_static_cache_turns_latent_and_a_filled_one_is_refused(llama: Tiny) -> None:
    static: list[Any] = [StaticCache(config=llama.model.config, max_cache_len=32) for _ in range(2)]
    llama.model(tokens(1, 4), past_key_values=static[0])
    model = llama.attach(budget=0.5, sink=2, recent=3)
    with pytest.raises(CacheError, match="the StaticCache cannot take latents"):
        model(tokens(1, 4), past_key_values=static[0])
    model(tokens(1, 4), past_key_values=static[1])
    assert type(static[1]) is StaticLatentCache
    how = {"cache_implementation": "static", "return_dict_in_generate": True}
    out: Any = greedy(model, tokens(1, 4), 2, **how)
    assert type(out.past_key_values) is StaticLatentCache


def test_a_cache_does_not_outlive_its_attachment(llama: Tiny) -> None:
    model = llama.attach(budget=0.5)
    cache = matkv.LatentCache(model)
    with torch.no_grad():
        model(tokens(1, 6), past_key_values=cache)
    matkv.detach(model)
    with pytest.raises(CacheError, match="not attached"):
        model(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_a_cache_keeps_its_ranks_when_the_model_changes_them(llama: Tiny) -> None:
    ids = tokens(1, 12)
    model = llama.attach(budget=0.25)
    expected = model(ids).logits
    cache = matkv.LatentCache(model)
    start = model(ids[:, :7], past_key_values=cache).logits
    llama.attach(budget=1.0)
    rest = model(ids[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((start, rest), 1), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from a GPU only")
def test_an_offloaded_cache_gives_the_same_tokens(llama: Tiny) -> None:
    model, ids = llama.attach(budget=0.5), tokens(1, 9)
    assert torch.equal(greedy(model, ids, cache_implementation="offloaded"), greedy(model, ids))
