"""Eviction at a budget: what is dropped, when, and that nothing else changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import matkv
from peer_rows import LENGTHS, PROTOCOL
from peers import eviction
from peers.entries import Calibration, entries
from peers.protocol import Method, score
from tiny import Tiny, build, tokens


@pytest.fixture
def windows() -> torch.Tensor:
    return tokens(2, 32, seed=5)


@pytest.mark.parametrize("rule", eviction.RULES)
def test_nothing_dropped_is_the_full_cache(
    llama: Tiny, windows: torch.Tensor, rule: eviction.Rule
) -> None:
    full = score(llama.model, windows, PROTOCOL, Method())
    row = score(llama.model, windows, PROTOCOL, eviction.Evicting(rule, 1.0))
    assert row["losses"] == pytest.approx(full["losses"], abs=1e-5)
    half = score(llama.model, windows, PROTOCOL, eviction.Evicting(rule, 0.5))
    assert half["losses"] != pytest.approx(full["losses"], abs=1e-3)


@pytest.mark.parametrize("rule", eviction.RULES)
def test_a_budget_is_held_after_every_chunk(
    llama: Tiny, windows: torch.Tensor, rule: eviction.Rule
) -> None:
    row = score(llama.model, windows, PROTOCOL, eviction.Evicting(rule, 0.5))
    assert row["budget"] == pytest.approx(sum(n // 2 for n in LENGTHS) / sum(LENGTHS))
    assert row["resident_bytes_per_token"] == row["bytes_per_token"]


def test_streaming_keeps_the_first_and_the_last(llama: Tiny) -> None:
    method, ids_BT = eviction.Evicting("StreamingLLM", 0.5), tokens(1, 24, seed=3)
    full = Method().read(llama.model, ids_BT).layers[0].keys
    with method.applied(llama.model) as used:
        held = method.read(used, ids_BT).layers[0].keys
    assert torch.allclose(held, torch.cat((full[:, :, :4], full[:, :, -8:]), dim=2))


def test_what_got_attention_stays() -> None:
    key_BGTD = torch.zeros(1, 1, 20, 4)
    key_BGTD[0, 0, 5, 0] = 10.0  # the only key that the queries look for
    query_BHQD = torch.tensor([1.0, 0, 0, 0]).expand(1, 2, 20, 4)
    rules: tuple[eviction.Rule, ...] = ("H2O", "SnapKV")
    for rule in rules:
        layer = eviction.EvictingLayer(rule, 0.5)
        layer.update(key_BGTD, key_BGTD.clone())
        layer.drop(query_BHQD, 1.0)
        assert layer.keys.shape[2] == 10
        assert float(layer.keys[..., 0].max()) == 10.0


def test_attention_given_is_that_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    query_BHQD = torch.randn(1, 4, 3, 8, generator=generator)
    key_BGTD = torch.randn(1, 2, 7, 8, generator=generator)
    expected_BGT = torch.zeros(1, 2, 7)
    for head in range(4):
        for query in range(3):
            seen_TD = key_BGTD[0, head // 2, : 4 + query + 1]
            weights_T = (seen_TD @ query_BHQD[0, head, query] * 0.3).softmax(0)
            expected_BGT[0, head // 2, : len(weights_T)] += weights_T
    given_BGT = eviction.attention_given(query_BHQD, key_BGTD, 4, 0.3)
    assert torch.allclose(given_BGT, expected_BGT, atol=1e-6)
    assert float(given_BGT.sum()) == pytest.approx(12)


def test_a_copy_of_a_cache_drops_its_own_tokens(llama: Tiny) -> None:
    method = eviction.Evicting("H2O", 0.5)
    with method.applied(llama.model) as used, torch.no_grad():
        cache = method.read(used, tokens(1, 24, seed=3))
        twin = copy.deepcopy(cache)
        positions_BT = torch.arange(24, 30)[None]
        used(tokens(1, 6, seed=4), past_key_values=twin, position_ids=positions_BT)
    assert [one.layers[0].keys.shape[2] for one in (cache, twin)] == [12, 15]
    assert cache.layers[0].seen == 24
    assert math.isfinite(float(twin.layers[0].given_BGT.sum()))


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(matkv.MatkvError, match="sliding"):
        eviction.Evicting("H2O", 0.5).new_cache(build("gemma3"))


def test_they_are_methods_of_the_comparison(llama: Tiny) -> None:
    calibration = Calibration(llama.model, None, lambda: [], 0)
    found = [one.contestant.name for one in entries(["eviction"], {}, (0.5,), calibration)]
    assert found == [f"{rule} style, 50% of the tokens" for rule in eviction.RULES]
