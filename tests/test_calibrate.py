"""Calibration: the moments are those of the tokens that count, and the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import matkv
from matkv.calibrate import CalibrateConfig, artifact_from
from matkv.errors import DataError, MatkvError, RankError, UnsupportedModelError
from matkv.hf.geometry import attention_modules, geometry_of
from matkv.hf.observe import collect_moments, observe
from matkv.progress import Progress
from matkv.ranks import SIDES
from tiny import COMMON, Tiny, from_config, largest_difference, left_padded, tokens

MOMENTS = ("key", "query", "value")


def states_of(subject: Tiny, ids_BT: Tensor) -> dict[int, dict[str, Tensor]]:
    """Queries, keys and values of every growing layer, seen one layer at a time."""
    seen: dict[int, dict[str, Tensor]] = {}

    def observer(layer: int) -> Any:
        def look(query: Tensor, key: Tensor, value: Tensor) -> None:
            seen[layer] = {"query": query, "key": key, "value": value}

        return look

    observe(
        subject.model,
        {n: observer(n) for n in subject.geometry.compressed},
        [ids_BT],
    )
    return seen


def test_moments_equal_a_direct_computation(family: Tiny) -> None:
    batches = [tokens(3, 17, seed=1), tokens(2, 9, seed=2)]
    layers, count = collect_moments(family.model, batches)
    assert count == 3 * 17 + 2 * 9
    assert tuple(layers) == geometry_of(family.model.config).compressed
    states = [states_of(family, batch) for batch in batches]
    modules = attention_modules(family.model)
    for layer, moments in layers.items():
        kv_heads, dim = moments.key.shape[:2]
        group = family.geometry.query_heads // kv_heads
        for name in MOMENTS:
            for head in range(kv_heads):
                heads = [head] if name != "query" else range(head * group, (head + 1) * group)
                rows_ND = torch.cat(
                    [state[layer][name][:, h].reshape(-1, dim) for state in states for h in heads]
                ).double()
                direct_DD = (rows_ND.T @ rows_ND / count).float()
                torch.testing.assert_close(
                    getattr(moments, name)[head], direct_DD, rtol=1e-4, atol=1e-5
                )
        attention: Any = modules[layer]
        weight_MX = (attention.o_proj if hasattr(attention, "o_proj") else attention.dense).weight
        for head in range(kv_heads):
            blocks = weight_MX.detach().split(dim, dim=1)[head * group : (head + 1) * group]
            direct_DD = sum(block.T @ block for block in blocks)
            torch.testing.assert_close(moments.output[head], direct_DD, rtol=1e-4, atol=1e-5)


def test_keys_are_seen_after_rotary_embedding(llama: Tiny) -> None:
    ids = tokens(1, 1).expand(1, 8)  # the same token eight times: only rotation tells them apart
    state = states_of(llama, ids)[0]
    assert largest_difference(state["value"][:, :, :1], state["value"]) < 1e-5
    assert largest_difference(state["key"][:, :, :1], state["key"]) > 0.1


def assert_same_moments(one: Any, other: Any) -> None:
    for layer in one:
        for name in MOMENTS:
            torch.testing.assert_close(
                getattr(one[layer], name), getattr(other[layer], name), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("skip_first", [0, 3])
def test_padding_and_first_tokens_are_left_out(family: Tiny, skip_first: int) -> None:
    prompts = [tokens(1, length, seed=length) for length in (12, 5, 8)]
    ids, mask = left_padded(prompts)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    padded, count = collect_moments(family.model, [batch], skip_first=skip_first)
    alone, expected = collect_moments(family.model, prompts, skip_first=skip_first)
    assert count == expected == 25 - 3 * skip_first
    assert_same_moments(padded, alone)


def test_right_padding_is_left_out_too(llama: Tiny) -> None:
    ids = torch.cat((tokens(1, 9), torch.zeros(1, 4, dtype=torch.long)), dim=1)
    padded, count = collect_moments(
        llama.model, [{"input_ids": ids, "attention_mask": (ids != 0).long()}], skip_first=2
    )
    alone, _ = collect_moments(llama.model, [ids[:, :9]], skip_first=2)
    assert count == 7
    assert_same_moments(padded, alone)


def test_moments_are_fp32_whatever_the_model_is(llama: Tiny) -> None:
    half = copy.deepcopy(llama.model).to(torch.bfloat16)
    layers, _ = collect_moments(half, [tokens(2, 16)])
    exact, _ = collect_moments(llama.model, [tokens(2, 16)])
    for layer, moments in layers.items():
        for name in MOMENTS:
            mine, theirs = getattr(moments, name), getattr(exact[layer], name)
            assert mine.dtype == torch.float32
            assert largest_difference(mine, theirs) < 0.05 * float(theirs.abs().max())


@pytest.mark.parametrize("key", ["pca", "query"])
@pytest.mark.parametrize("value", ["pca", "output"])
def test_the_artifact_says_how_it_was_made(llama: Tiny, key: Any, value: Any) -> None:
    config = CalibrateConfig(key=key, value=value, skip_first=1, sink=2, recent=5)
    artifact = matkv.calibrate(llama.model, [tokens(2, 20)], config)
    assert artifact.geometry == llama.geometry
    settings = {"key": key, "value": value, "skip_first": 1, "sink": 2, "recent": 5}
    made = {"stage": "calibrate", **settings, "windows": True, "tokens": 38}
    assert artifact.history == (made,)
    assert (artifact.sink, artifact.recent) == (2, 5)
    for layer in artifact.bases:
        for side in SIDES:
            energy_GD = artifact.bases[layer][side].energy_GD
            torch.testing.assert_close(energy_GD.sum(-1), torch.ones(len(energy_GD)))


def test_moments_collected_once_serve_every_kind_of_basis(llama: Tiny) -> None:
    ids = tokens(2, 20)
    layers, count = collect_moments(llama.model, [ids])
    config = CalibrateConfig(key="pca", value="pca")
    shared = artifact_from(llama.model, layers, config, tokens=count)
    own = matkv.calibrate(llama.model, [ids], config)
    assert shared.history == own.history
    assert torch.equal(shared.maps(1, "key").encode_XDD, own.maps(1, "key").encode_XDD)


def test_progress_counts_tokens_and_time(llama: Tiny) -> None:
    seen: list[Progress] = []
    matkv.calibrate(llama.model, [tokens(2, 8), tokens(1, 5)], on_progress=seen.append)
    assert [(at.done, at.unit) for at in seen] == [(16, "tokens"), (21, "tokens")]
    assert 0 < seen[0].seconds < seen[1].seconds


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stops", [None, ValueError, KeyboardInterrupt])
def test_the_model_stays_as_it_was(
    llama: Tiny, training: bool, stops: type[BaseException] | None
) -> None:
    model = llama.model.train(training)

    def batches() -> Iterator[Tensor]:
        yield tokens(1, 5)
        if stops is not None:
            raise stops

    try:
        if stops is None:
            matkv.calibrate(model, batches())
        else:
            with pytest.raises(stops):
                matkv.calibrate(model, batches())
        assert model.training == training
        assert model.config._attn_implementation == "sdpa"
        assert not any("matkv" in vars(module) for module in model.modules())
    finally:
        model.eval()


# ---- bad input


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 0, dtype=torch.long)], [tokens(3, 2)]])
def test_text_without_a_token_that_counts_is_refused(llama: Tiny, batches: list[Tensor]) -> None:
    with pytest.raises(DataError, match="no token to calibrate on"):
        matkv.calibrate(llama.model, batches, CalibrateConfig(skip_first=2))


def test_an_attached_model_is_refused(llama: Tiny) -> None:
    llama.attach(budget=0.5)
    with pytest.raises(MatkvError, match="the model is attached"):
        matkv.calibrate(llama.model, [tokens(1, 5)])
    assert llama.model.config._attn_implementation == "matkv"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "svd"}, "key 'svd' must be one of pca, query"),
        ({"value": "svd"}, "value 'svd' must be one of pca, output"),
        ({"skip_first": -1}, "skip_first -1 must be 0 or more"),
        ({"recent": -2}, "recent -2 must be 0 or more"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        CalibrateConfig(**options)


def test_an_output_projection_of_another_kind_is_named() -> None:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    with pytest.raises(UnsupportedModelError, match="no linear output projection"):
        matkv.calibrate(from_config(config), [tokens(1, 5)])


def test_heads_that_are_not_those_of_the_config_are_refused(llama: Tiny) -> None:
    model = from_config(transformers.LlamaConfig(**COMMON))
    model.config.num_key_value_heads = 4
    with pytest.raises(UnsupportedModelError, match="its config says 4 of width 16"):
        matkv.calibrate(model, [tokens(1, 5)])
