"""Fast paths of decoding against explicit scores.

Without a GPU the Triton kernel runs under Triton's interpreter, see conftest.py: slow, but the same
program.

Shapes: B batch, H query head, G KV head, T token, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from explicit import attend_explicit
from layers import RANKS, plain_layer
from matkv.attention import latent as attention
from matkv.attention.kernels import cpu as cpu
from matkv.attention.latent import attend
from matkv.cache.layer import LatentLayer
from matkv.hf import handlers as hf
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection
from matkv.ranks import LayerRanks
from one_query import KEY, SCALING, VALUE, check, kernel, padding, queries
from tiny import Tiny, greedy, largest_difference, left_padded, random_maps, tokens

every_rank = pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    with kernel("gpu") as module:
        yield module


# ---- Triton


@every_rank
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("length", [1, 64, 131])
def test_triton_equals_explicit_scores(
    gpu: Any, ranks: tuple[LayerRanks, LayerRanks], group: int, length: int
) -> None:
    check(gpu.decode, plain_layer(ranks, 2, length), queries(2, group))


@pytest.mark.parametrize("splits", [1, 2, 3, 99])
def test_triton_may_split_the_context_anyhow(gpu: Any, splits: int) -> None:
    def decode(*inputs: Any) -> Tensor:
        out: Tensor = gpu.decode(*inputs, splits=splits)
        return out

    check(decode, plain_layer(RANKS["odd"], 1, 300), queries(1, 2))


@pytest.mark.parametrize("starts", [(0, 5, 199), (70, 130, 200)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_triton_honours_padding(gpu: Any, starts: tuple[int, ...], kind: torch.dtype) -> None:
    """Padding of any length, whole parts of the context and all but nothing included."""
    length = 201
    check(
        gpu.decode,
        plain_layer(RANKS["odd"], 3, length),
        queries(3, 2),
        padding(starts, length, kind),
    )


def test_triton_shares_one_mask_between_sequences(gpu: Any) -> None:
    check(gpu.decode, plain_layer(RANKS["odd"], 2, 70), queries(2, 1), padding((9,), 70))


def test_triton_stays_finite_where_a_query_sees_nothing(gpu: Any) -> None:
    latents = plain_layer(RANKS["odd"], 2, 70)
    with mock.patch.object(attention, "_decoder", lambda *_: gpu.decode), torch.no_grad():
        out = attend(latents, queries(2, 1), padding((0, 70), 70), scaling=SCALING)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_in_half_precision_is_close(gpu: Any, dtype: torch.dtype) -> None:
    latents, query = plain_layer(RANKS["odd"], 1, 150), queries(1, 2)
    expected = attend_explicit(latents, query, None, scaling=SCALING)
    half = Latents(
        LayerProjection(KEY, VALUE, *RANKS["odd"]).to(dtype), [r.to(dtype) for r in latents.rows]
    )
    with mock.patch.object(attention, "_decoder", lambda *_: gpu.decode), torch.no_grad():
        out = attend(half, query.to(dtype), None, scaling=SCALING)
    assert out.dtype == dtype
    assert largest_difference(out, expected) < 0.05


def test_triton_generates_the_same_tokens(gpu: Any, llama: Tiny) -> None:
    """Through a whole model: a left-padded batch whose buffers grow on the way."""
    llama.attach(ranks=llama.ragged(1))
    ids, mask = left_padded([tokens(1, 62), tokens(1, 7, seed=1)])
    expected = greedy(llama.model, ids, new=5, attention_mask=mask)
    with mock.patch.object(attention, "_decoder", lambda *_: gpu.decode):
        assert torch.equal(greedy(llama.model, ids, new=5, attention_mask=mask), expected)


def test_places_of_rows_are_copied_once_to_the_device(gpu: Any) -> None:
    latents, query = plain_layer(RANKS["odd"], 1, 10), queries(1, 1)
    gpu.table.cache_clear()
    for _ in range(3):
        check(gpu.decode, latents, query)
    assert gpu.table.cache_info().misses == 1


# ---- CPU


@every_rank
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 5, 13])
def test_cpu_equals_explicit_scores_however_it_splits(
    ranks: tuple[LayerRanks, LayerRanks],
    threads: int,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "MIN_SPLIT", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for batch in (1, 3):
        latents = plain_layer(ranks, batch, length)
        for group in (1, 3):
            check(cpu.decode, latents, queries(batch, group))
            starts = (length // 2, 0, length - 1)[:batch]
            check(cpu.decode, latents, queries(batch, group), padding(starts, length))


@every_rank
def test_cpu_in_bfloat16_is_close(ranks: tuple[LayerRanks, LayerRanks]) -> None:
    latents, query = plain_layer(ranks, 2, 40), queries(2, 1)
    expected = attend_explicit(latents, query, None, scaling=SCALING)
    dtype = torch.bfloat16
    half = Latents(
        LayerProjection(KEY, VALUE, *ranks).to(dtype), [r.to(dtype) for r in latents.rows]
    )
    with torch.no_grad():
        out = attend(half, query.to(dtype), None, scaling=SCALING)
    assert largest_difference(out, expected) < 0.1


def test_cpu_views_half_a_row_of_64_a_little_wider() -> None:
    """32 + 32: eight more columns, which the maps have to spare, change nothing."""
    key, value = random_maps(2, 64, 1), random_maps(2, 64, 2)
    projection = LayerProjection(key, value, (32, 32), (32, 32))
    assert cpu._fast_width(projection.buckets[0], projection.width) == 40
    key_BGTD, value_BGTD = torch.randn(2, 1, 2, 9, 64, generator=torch.Generator().manual_seed(0))
    latents = LatentLayer(projection).update(key_BGTD, value_BGTD)[0]
    query = torch.randn(1, 6, 1, 64, generator=torch.Generator().manual_seed(1))
    check(cpu.decode, latents, query)


def test_gradients_take_the_differentiable_path() -> None:
    latents, query = plain_layer(RANKS["odd"], 1, 9), queries(1, 2).requires_grad_()
    with mock.patch.object(cpu, "flash", side_effect=AssertionError):
        attend(latents, query, None, scaling=SCALING).sum().backward()
    assert query.grad is not None


def test_the_fast_path_generates_the_tokens_of_the_reference(
    family: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    family.attach(ranks=family.ragged(1))
    ids, mask = left_padded([tokens(1, 14), tokens(1, 6, seed=1)])
    fast = greedy(family.model, ids, new=12, attention_mask=mask)
    monkeypatch.setattr(hf, "attend", attend_explicit)
    assert torch.equal(greedy(family.model, ids, new=12, attention_mask=mask), fast)
