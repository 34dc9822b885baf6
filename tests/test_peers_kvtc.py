"""KVTC's transform coding: bytes by formula, bits where they pay, the full cache at last.

Shapes: B batch, G KV head, T token, D head dim, N = G D, E token, K group of columns.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import matkv
from matkv.allocate.bits import CHOICES
from matkv.cache.naming import cache_argument
from matkv.codes import widths_of
from matkv.ranks import SIDES, RankTable
from peer_rows import LENGTHS, PROTOCOL, distance, first_keys, heavy
from peers import kvtc
from peers.entries import Calibration, entries
from peers.protocol import Method, Row, full_bytes_per_token, score
from tiny import FAMILIES, Tiny, build, from_config, tokens


@pytest.fixture
def windows() -> torch.Tensor:
    return tokens(3, 32, seed=5)


@pytest.fixture
def full(llama: Tiny, windows: torch.Tensor) -> Row:
    return score(llama.model, windows, PROTOCOL, Method())


@pytest.fixture
def bases(llama: Tiny) -> list[Any]:
    return kvtc.joint_bases(llama.model, [tokens(4, 48, seed=7), tokens(4, 48, seed=8)])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma3", "gemma3_rings"}))
def test_the_rotary_embedding_comes_off_and_on(family: str) -> None:
    """Keys of one token are the same in all slots of the first layer once it is off."""
    model = build(family)
    rotary, cache = kvtc.Rotary(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.full((2, 20), 7), **cache_argument(model, cache))
    key_BGTD = first_keys(cache)
    plain_BGTD = rotary.off(key_BGTD)
    assert not torch.allclose(key_BGTD, key_BGTD[:, :, :1].expand_as(key_BGTD), atol=1e-2)
    assert torch.allclose(plain_BGTD, plain_BGTD[:, :, :1].expand_as(key_BGTD), atol=1e-4)
    assert torch.allclose(rotary.on(plain_BGTD), key_BGTD, atol=1e-5)


def test_heads_are_joined_as_their_projection_gives_them(llama: Tiny) -> None:
    seen: list[torch.Tensor] = []
    projection = llama.model.model.layers[0].self_attn.k_proj
    handle = projection.register_forward_hook(lambda *a: seen.append(a[2].detach()))
    cache = DynamicCache(config=llama.model.config)
    with torch.no_grad():
        llama.model(tokens(2, 20, seed=7), **cache_argument(llama.model, cache))
    handle.remove()
    plain_BGTD = kvtc.Rotary(llama.model).off(first_keys(cache))
    assert torch.allclose(kvtc.joined(plain_BGTD), seen[0], atol=1e-5)
    assert torch.equal(kvtc.parted(kvtc.joined(plain_BGTD), 2), plain_BGTD)


def test_an_extended_rotary_embedding_comes_off(llama: Tiny) -> None:
    config = type(llama.model.config)(**llama.model.config.to_dict())
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    rotary, key_BGTD = kvtc.Rotary(from_config(config)), heavy(1, 2, 12, 16)
    on_BGTD = rotary.on(key_BGTD)
    assert float(on_BGTD.norm()) > 1.05 * float(key_BGTD.norm())
    assert torch.allclose(rotary.off(on_BGTD), key_BGTD, atol=1e-4)


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(matkv.MatkvError, match="without a sliding window"):
        kvtc.Rotary(build("gemma3"))


def test_joint_components_are_uncorrelated_and_ordered(llama: Tiny, bases: list[Any]) -> None:
    seen: list[torch.Tensor] = []
    projection = llama.model.model.layers[1].self_attn.v_proj
    handle = projection.register_forward_hook(lambda *a: seen.append(a[2].detach()))
    with torch.no_grad():
        for seed in (7, 8):
            llama.model(tokens(4, 48, seed=seed))
    handle.remove()
    y_EN = torch.cat([y_BTN[:, kvtc.SINK :].flatten(0, 1) for y_BTN in seen])
    basis = bases[1]["value"]
    assert torch.allclose(basis.mean_N, y_EN.mean(0), atol=1e-6)
    z_EN = (y_EN - basis.mean_N) @ basis.maps.encode_XDD[0]
    moment_NN = z_EN.T @ z_EN / len(z_EN)
    energy_N = moment_NN.diagonal()
    assert torch.allclose(moment_NN, energy_N.diag(), atol=1e-4)
    assert (energy_N.diff() <= 1e-5).all()
    # A dropped component costs its energy.
    assert torch.allclose(kvtc.errors(basis)[:, -1], energy_N, rtol=1e-3)


@pytest.mark.parametrize("budget", [1.0, 0.4, 0.25, 0.1, 0.04])
def test_bits_are_within_the_budget_on_either_side(bases: list[Any], budget: float) -> None:
    table = kvtc.allocated(bases, budget)
    # The price of a bit is one for all, so that a last step in every layer may find no room.
    step = len(bases) * (2 * kvtc.STEP / 8 + 1) / (len(bases) * 2 * 32)
    for side in SIDES:
        assert min(budget, 33 / 64) - 2 * step < table.share(side) <= budget + 1e-9
    columns = sum(sum(bands[1:]) for bands in table.coded.values())
    assert table.columns == columns  # nothing at 16 bits
    if budget == 1:
        assert set(table.coded.values()) == {(0, 32, 0, 0)}


def test_bits_are_where_they_save_the_most_error(bases: list[Any]) -> None:
    """The same widths shuffled over the columns of all layers have more."""
    table, step = kvtc.allocated(bases, 0.2), kvtc.STEP
    generator = torch.Generator().manual_seed(0)
    for side in SIDES:
        errors, chosen = [], []
        for layer, sides in enumerate(bases):
            widths = widths_of(table.bands(layer, side)[0])
            widths += [0] * (32 - len(widths))
            chosen += [CHOICES.index(width) for width in widths[::step]]
            errors.append(kvtc.errors(sides[side]))
        error_KW = torch.cat(errors).unflatten(0, (-1, step)).sum(1)
        places_K = torch.tensor(chosen)[:, None]
        least = error_KW.gather(1, places_K).sum()
        for _ in range(20):
            shuffled_K = places_K[torch.randperm(len(chosen), generator=generator)]
            assert error_KW.gather(1, shuffled_K).sum() > least


@pytest.mark.parametrize("recent", [0, 6, 128])
def test_joint_codes_count_their_bytes(
    llama: Tiny, windows: torch.Tensor, bases: list[Any], recent: int
) -> None:
    method = kvtc.Kvtc(bases, 0.2, recent=recent)
    row = score(llama.model, windows, PROTOCOL, method)
    a_token = 0
    for bands in method.table.coded.values():
        _, eight, four, two = bands
        a_token += eight + math.ceil(four / 2) + math.ceil(two / 4) + 1
    whole = full_bytes_per_token(llama.model)
    exact = {tokens: min(tokens, 4 + recent) for tokens in LENGTHS}
    expected = sum((tokens - n) * a_token + n * whole for tokens, n in exact.items())
    assert row["bytes_per_token"] == pytest.approx(expected / sum(LENGTHS))
    ranks = [rank for *_, rank in method.table.compressed_ranks()]
    assert row["fixed_bytes"] == sum(32 * rank + 32 + 2 * rank for rank in ranks) * 4


def test_the_loss_of_joint_codes_falls_to_none_with_their_bits(
    llama: Tiny, windows: torch.Tensor, full: Row, bases: list[Any]
) -> None:
    rows = [
        score(llama.model, windows, PROTOCOL, kvtc.Kvtc(bases, budget, recent=0))
        for budget in (1.0, 0.25, 0.06)
    ]
    distances = [distance(row, full) for row in rows]
    assert distances == sorted(distances)
    assert distances[0] < 0.02 < distances[-1]
    # With every token exact it is the full cache.
    exact = score(llama.model, windows, PROTOCOL, kvtc.Kvtc(bases, 0.06, recent=32))
    assert exact["losses"] == pytest.approx(full["losses"], abs=1e-4)
    assert exact["growing_budget"] == pytest.approx(1)


def test_a_dropped_component_is_its_mean(llama: Tiny, bases: list[Any]) -> None:
    """Keys have theirs before the rotary embedding; the first tokens stay as they are."""
    method = kvtc.Kvtc(bases, 0.1)
    geometry = method.table.geometry
    none = {(layer, side, 0): (0, 0, 0, 0) for layer in geometry.compressed for side in SIDES}
    method.table = RankTable.banded(geometry, none)
    handler = method.handlers(llama.model)[0]
    assert (handler.sink, handler.recent) == (4, 128)
    key_BGTD, value_BGTD = heavy(1, 2, 12, 16), heavy(1, 2, 12, 16)
    key, value = handler(key_BGTD, value_BGTD)
    for side, x_BGTD in (("key", kvtc.Rotary(llama.model).off(key)), ("value", value)):
        mean_N = bases[0][side].mean_N
        assert torch.allclose(kvtc.joined(x_BGTD)[0, 4:], mean_N.expand(8, -1), atol=1e-5)
    for x_BGTD, exact_BGTD in ((key, key_BGTD), (value, value_BGTD)):
        assert torch.equal(x_BGTD[:, :, :4], exact_BGTD[:, :, :4])


# ---- entries


def test_kvtc_is_calibrated_once_for_all_budgets(
    llama: Tiny, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(llama.model, None, lambda: [], 4096)
    calibration.__dict__["batches"] = [tokens(4, 48, seed=7)]
    calls: list[int] = []
    fitted = kvtc.joint_bases

    def counted(*given: Any) -> Any:
        calls.append(1)
        return fitted(*given)

    monkeypatch.setattr(kvtc, "joint_bases", counted)
    rows = [
        score(llama.model, windows, PROTOCOL, entry.contestant.build())
        for entry in entries(("kvtc",), {}, (0.5, 0.1), calibration)
        if "last 32" in entry.contestant.setting
    ]
    assert len(rows) == 2 and calls == [1]
