"""The Triton kernel on codes against latents that torch unpacks, under Triton's interpreter.

Shapes: B batch, G KV head, N and T token, D head dim.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

import matkv
from coded import coded, random_bands
from explicit import attend_explicit
from layers import BANDS, MIXED, banded, coded_layer
from matkv.attention import latent as attention
from matkv.attention.latent import attend
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection
from matkv.ranks import LayerBands
from one_query import KEY, SCALING, VALUE, D, G, check, kernel, padding, queries
from tiny import greedy, largest_difference, left_padded, tokens

every_mix = pytest.mark.parametrize("bands", BANDS.values(), ids=BANDS)


@pytest.fixture(scope="module")
def gpu_codes() -> Iterator[Any]:
    with kernel("gpu_codes") as module:
        yield module


@every_mix
@pytest.mark.parametrize(("group", "length"), [(1, 1), (3, 64), (4, 131), (1, 131)])
def test_codes_equal_explicit_scores(
    gpu_codes: Any, bands: tuple[LayerBands, LayerBands], group: int, length: int
) -> None:
    check(gpu_codes.decode, coded_layer(bands, 2, length), queries(2, group))


@pytest.mark.parametrize("seed", range(6))
def test_any_bands_equal_explicit_scores(gpu_codes: Any, seed: int) -> None:
    rng = random.Random(seed)
    key, value = (tuple(random_bands(rng, D) for _ in range(G)) for _ in range(2))
    check(gpu_codes.decode, coded_layer((key, value), 1, 70), queries(1, 2), padding((5,), 70))


@pytest.mark.parametrize("splits", [1, 2, 3, 99])
def test_the_context_may_be_split_anyhow(gpu_codes: Any, splits: int) -> None:
    check(partial(gpu_codes.decode, splits=splits), coded_layer(MIXED, 1, 300), queries(1, 2))


@pytest.mark.parametrize("starts", [(0, 5, 199), (70, 130, 200)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_padding_is_honoured(gpu_codes: Any, starts: tuple[int, ...], kind: torch.dtype) -> None:
    """Padding of any length, whole parts of the context and all but nothing included."""
    mask = padding(starts, 201, kind)
    check(gpu_codes.decode, coded_layer(MIXED, 3, 201), queries(3, 2), mask)


def test_one_mask_is_shared_between_sequences(gpu_codes: Any) -> None:
    check(gpu_codes.decode, coded_layer(MIXED, 2, 70), queries(2, 1), padding((9,), 70))


@pytest.mark.parametrize("mix", ["mixed", "key without", "nothing"])
def test_a_query_that_sees_nothing_stays_finite(gpu_codes: Any, mix: str) -> None:
    with mock.patch.object(attention, "_decoder", lambda *_: gpu_codes.decode), torch.no_grad():
        out = attend(
            coded_layer(BANDS[mix], 2, 70), queries(2, 1), padding((0, 70), 70), scaling=SCALING
        )
    assert bool(out.isfinite().all())


@every_mix
def test_exact_tokens_are_merged_by_the_sum_of_weights(
    gpu_codes: Any, bands: tuple[LayerBands, LayerBands]
) -> None:
    latents = coded_layer(bands, 2, 90, sink=2, recent=3)
    check(gpu_codes.decode, latents, queries(2, 3))
    check(gpu_codes.decode, latents, queries(2, 3), padding((0, 40), 90))


@every_mix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(
    gpu_codes: Any, bands: tuple[LayerBands, LayerBands], dtype: torch.dtype
) -> None:
    latents, query = coded_layer(bands, 1, 150), queries(1, 2)
    expected = attend_explicit(latents, query, None, scaling=SCALING)
    rows = [part if part.dtype == torch.uint8 else part.to(dtype) for part in latents.rows]
    half = Latents(banded(bands).to(dtype), rows)
    with mock.patch.object(attention, "_decoder", lambda *_: gpu_codes.decode), torch.no_grad():
        out = attend(half, query.to(dtype), None, scaling=SCALING)
    assert out.dtype == dtype
    assert largest_difference(out, expected) < 0.05


def test_it_generates_the_same_tokens(gpu_codes: Any) -> None:
    """Through a whole model: a left-padded batch whose buffers grow on the way."""
    subject = coded("llama")
    subject.attach(ranks=subject.ragged(1))
    ids, mask = left_padded([tokens(1, 62), tokens(1, 7, seed=1)])
    expected = greedy(subject.model, ids, new=5, attention_mask=mask)
    with mock.patch.object(attention, "_decoder", lambda *_: gpu_codes.decode):
        assert torch.equal(greedy(subject.model, ids, new=5, attention_mask=mask), expected)
    matkv.detach(subject.model)


def test_cuda_takes_it_where_there_are_codes(gpu_codes: Any) -> None:
    query = mock.Mock(device=torch.device("cuda"), requires_grad=False)
    assert attention._decoder(query, coded_layer(MIXED, 1, 3)) is gpu_codes.decode
    plain = LayerProjection(KEY, VALUE, (3,) * G, (5,) * G)
    states = torch.zeros(2, 1, G, 3, D)
    decode = attention._decoder(query, Latents(plain, plain.encode(*states)))
    assert decode is gpu_codes.gpu.decode
