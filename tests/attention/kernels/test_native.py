"""The compiled kernel against explicit scores, for all instructions that this processor has.

Shapes: B batch, G KV head, H query head, K page, N token of a page, X page of a sequence, T token,
D head dim.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import random
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import matkv
from coded import coded, random_bands
from explicit import attend_explicit
from layers import BANDS, MIXED, RANKS, banded, coded_layer, plain_layer
from matkv.attention import latent as attention
from matkv.attention.kernels import cpu, native
from matkv.attention.latent import attend, attend_part_of
from matkv.attention.parts import merge
from matkv.latents import compiled
from matkv.latents.latents import Latents
from matkv.latents.layer import per_head
from matkv.latents.native import Paged, encode_paged
from matkv.ranks import LayerBands
from one_query import SCALING, D, G, check, padding, queries
from paging import LAYERS, RANGES, paged, part_of, whole_layer
from tiny import greedy, largest_difference, left_padded, tokens

KERNELS = [*compiled.INSTRUCTIONS, "DEFAULT"]
every_mix = pytest.mark.parametrize("bands", BANDS.values(), ids=BANDS)


@pytest.fixture(scope="module", params=KERNELS)
def decode(request: pytest.FixtureRequest) -> Iterator[Any]:
    """`native.decode` compiled for some instructions."""
    with built_for(request.param):
        yield native.decode


@pytest.fixture(scope="module")
def own() -> None:
    if compiled.kernel() is None:
        pytest.skip(f"no compiled kernel: {compiled.trouble()}")


def built_for(instructions: str) -> Any:
    able = torch.backends.cpu.get_cpu_capability()
    known = KERNELS[KERNELS.index(able) if able in KERNELS else -1 :]
    if instructions not in known:
        pytest.skip(f"this processor, or torch on it, has no {instructions}")
    if compiled.kernel() is None:
        pytest.skip(f"no compiled kernel: {compiled.trouble()}")
    one = compiled.built(instructions)
    return mock.patch.object(native, "kernel", lambda: one)


@every_mix
@pytest.mark.parametrize(("group", "length"), [(1, 1), (3, 64), (4, 131), (1, 131), (7, 65)])
def test_codes_equal_explicit_scores(
    decode: Any, bands: tuple[LayerBands, LayerBands], group: int, length: int
) -> None:
    check(decode, coded_layer(bands, 2, length), queries(2, group))


@pytest.mark.parametrize("seed", range(12))
def test_any_bands_equal_explicit_scores(decode: Any, seed: int) -> None:
    rng = random.Random(seed)
    key, value = (tuple(random_bands(rng, D) for _ in range(G)) for _ in range(2))
    check(decode, coded_layer((key, value), 1, 70), queries(1, 2), padding((5,), 70))


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize(("group", "length"), [(1, 1), (3, 64), (2, 131)])
def test_ranks_equal_explicit_scores(decode: Any, ranks: Any, group: int, length: int) -> None:
    latents = plain_layer(ranks, 2, length)
    check(decode, latents, queries(2, group))
    check(decode, latents, queries(2, group), padding((0, length // 2), length))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_share_the_context_anyhow(
    decode: Any, threads: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    latents = coded_layer(MIXED, batch, 2500)
    check(decode, latents, queries(batch, 2))
    check(decode, latents, queries(batch, 2), padding((0, 1100, 2499)[:batch], 2500))


@pytest.mark.parametrize("starts", [(0, 5, 199), (70, 130, 200)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_padding_is_honoured(decode: Any, starts: tuple[int, ...], kind: torch.dtype) -> None:
    check(decode, coded_layer(MIXED, 3, 201), queries(3, 2), padding(starts, 201, kind))


def test_one_mask_is_shared_between_sequences(decode: Any) -> None:
    check(decode, coded_layer(MIXED, 2, 70), queries(2, 1), padding((9,), 70))


@pytest.mark.parametrize("mix", ["mixed", "key without", "nothing"])
def test_a_query_that_sees_nothing_stays_finite(decode: Any, mix: str) -> None:
    with mock.patch.object(attention, "_decoder", lambda *_: decode), torch.no_grad():
        latents = coded_layer(BANDS[mix], 2, 70)
        out = attend(latents, queries(2, 1), padding((0, 70), 70), scaling=SCALING)
    assert bool(out.isfinite().all())


@every_mix
def test_exact_tokens_are_merged_by_the_sum_of_weights(
    decode: Any, bands: tuple[LayerBands, LayerBands]
) -> None:
    latents = coded_layer(bands, 2, 90, sink=2, recent=3)
    check(decode, latents, queries(2, 3))
    check(decode, latents, queries(2, 3), padding((0, 40), 90))


@every_mix
@pytest.mark.parametrize(("dtype", "room"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_close(
    decode: Any, bands: tuple[LayerBands, LayerBands], dtype: torch.dtype, room: float
) -> None:
    latents, query = coded_layer(bands, 1, 150), queries(1, 2)
    rows = [part if part.dtype == torch.uint8 else part.to(dtype) for part in latents.rows]
    half = Latents(banded(bands).to(dtype), rows)
    mask = padding((7,), 150)
    expected = attend_explicit(half, query.to(dtype), mask, scaling=SCALING)
    with mock.patch.object(attention, "_decoder", lambda *_: decode), torch.no_grad():
        out = attend(half, query.to(dtype), mask, scaling=SCALING)
    assert out.dtype == dtype
    assert largest_difference(out, expected) < room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_agrees_with_torch_on_output_and_sum(decode: Any, dtype: torch.dtype) -> None:
    """What comes back is what `cpu.decode` gives of unpacked rows, in its dtypes and shapes."""
    latents = coded_layer(MIXED, 2, 300)
    rows = [part if part.dtype == torch.uint8 else part.to(dtype) for part in latents.rows]
    projection = latents.projection
    query_BGXM = per_head(projection.enter(queries(2, 3)), projection.query).to(dtype)
    out, lse = decode(query_BGXM, rows, projection, None, SCALING)
    expected, sums = attention._decode_stretches(query_BGXM, rows, projection, None, SCALING)
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    assert (lse.shape, lse.dtype) == (sums.shape, torch.float32)
    room = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert largest_difference(lse, sums) < room
    for g, ranks in enumerate(projection.ranks.tolist()):
        kept = slice(projection.width - ranks[1], projection.width)
        assert largest_difference(out[:, g, :, kept], expected[:, g, :, kept]) < 10 * room
        assert not out[:, g, :, : kept.start].any()


# ---- half precision, bit by bit


def test_every_half_is_read_and_written_as_torch_does(decode: Any) -> None:
    """A single token is its own output: all finite numbers of 16 bits pass through."""
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
        numbers = numbers[numbers.isfinite()]
        rows = torch.zeros(len(numbers), G, 1, 24, dtype=dtype)
        rows[:, :, 0, 5] = numbers[:, None]
        projection = plain_layer(((0,) * G, (D,) * G), 1, 1).projection
        query = torch.zeros(len(numbers), G, 1, projection.width, dtype=dtype)
        out, _ = decode(query, [rows], projection, None, SCALING)
        assert torch.equal(out[:, 0, 0, 5 - D], numbers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_to_nearest_even(decode: Any, dtype: torch.dtype) -> None:
    """Two tokens of equal weight: their mean lies halfway between neighbours."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 1 << 16, (4000,), generator=generator, dtype=torch.int32)
    one = bits.to(torch.uint16).view(dtype)
    other = (bits + 1).clamp_max((1 << 16) - 1).to(torch.uint16).view(dtype)
    mean = (one.float() + other.float()) / 2
    is_fine = mean.isfinite() & (mean.abs() < torch.finfo(dtype).max)
    one, other, mean = one[is_fine], other[is_fine], mean[is_fine]
    rows = torch.zeros(len(one), G, 2, D, dtype=dtype)
    rows[:, :, 0, 0], rows[:, :, 1, 0] = one[:, None], other[:, None]
    projection = plain_layer(((0,) * G, (D,) * G), 1, 1).projection
    query = torch.zeros(len(one), G, 1, projection.width, dtype=dtype)
    out, _ = decode(query, [rows], projection, None, SCALING)
    assert torch.equal(out[:, 0, 0, -D], mean.to(dtype))


# ---- nothing behind the rows is read


def fenced(row: torch.Tensor) -> torch.Tensor:
    """A copy at whose end memory ends: reading on would end the process."""
    size, page = row.numel() * row.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), ctypes.c_size_t(page), 0) == 0
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    FENCES.append((memory, whole))
    copy = whole[pages * page - size : pages * page].view(row.dtype).view(row.shape)
    copy.copy_(row)
    return copy


FENCES: list[object] = []  # a fence is never taken down: what it guards may still be used


@pytest.mark.skipif(sys.platform != "linux", reason="fences are those of Linux")
@pytest.mark.parametrize("made", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("length", [1, 2, 67])
def test_nothing_behind_the_rows_is_read(decode: Any, made: Any, length: int) -> None:
    make, table = made
    latents = make(table, 2, length)
    for dtype in (torch.float32, torch.bfloat16):
        rows = [
            (row if row.dtype == torch.uint8 else row.to(dtype)).contiguous()
            for row in latents.rows
        ]
        rows_fenced = [fenced(row) if row.numel() else row for row in rows]
        projection = latents.projection
        query = torch.randn(2, G, 3, projection.width, generator=torch.Generator().manual_seed(0))
        ends = [
            decode(query.to(dtype), one, projection, None, SCALING) for one in (rows, rows_fenced)
        ]
        assert all(map(torch.equal, *ends))


# ---- pages


def step_of(
    latents: Latents,
    query: Tensor,
    reads: native.Reads,
    near: native.Reads | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """`native.attend_paged` of queries [THD], where nothing is written what is no number."""
    out = torch.full_like(query, torch.nan)
    native.attend_paged(
        query, out, latents.projection, reads, near, tokens_B=tokens, scaling=SCALING
    )
    return out


@pytest.mark.parametrize("made", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("page", [1, 16, 48])
def test_pages_equal_rows(decode: Any, made: Any, page: int) -> None:
    make, table = made
    latents, lengths = make(table, 4, 131), [131, 1, 16, 77]
    query = queries(4, 3)
    out = step_of(latents, query[:, :, 0], paged(latents, [[(0, one)] for one in lengths], page))
    for b, length in enumerate(lengths):
        own = part_of(latents, b, [(0, length)])
        expected = attend_explicit(own, query[b : b + 1], None, scaling=SCALING)
        assert largest_difference(out[b], expected[0, :, 0]) < 2e-6


@pytest.mark.parametrize("made", LAYERS.values(), ids=LAYERS)
def test_pages_are_read_in_ranges(decode: Any, made: Any) -> None:
    make, table = made
    latents, query = make(table, 4, 60), queries(4, 2)
    out = step_of(latents, query[:, :, 0], paged(latents, RANGES, 16))
    for b, ranges in enumerate(RANGES[:3]):
        own = part_of(latents, b, ranges)
        expected = attend_explicit(own, query[b : b + 1], None, scaling=SCALING)
        assert largest_difference(out[b], expected[0, :, 0]) < 2e-6
    assert not out[3].any()


@pytest.mark.parametrize("made", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_puts_exact_tokens_and_latents_together(
    decode: Any, made: Any, dtype: torch.dtype
) -> None:
    """Of five tokens two are those of sequences, whose queries lie among keys and values."""
    make, table = made
    latents, whole = make(table, 2, 60), whole_layer(2, 60)
    for one in (latents, whole):
        one.projection.to(dtype)
        one.rows = [row if row.dtype == torch.uint8 else row.to(dtype) for row in one.rows]
    far, near = [[(4, 50)], [(4, 1)]], [[(0, 4), (50, 60)], [(0, 3), (3, 3)]]
    mixed = torch.randn(5, 2, queries(1, 3).shape[1], D).to(dtype)
    tokens = torch.tensor([3, 1])
    out = step_of(
        latents, mixed[:, 0], paged(latents, far, 16), paged(whole, near, 4, seed=1), tokens
    )
    assert bool(out[[0, 2, 4]].isnan().all())
    for b, token in enumerate(tokens.tolist()):
        query = mixed[None, token, 0, :, None].float()
        parts = [
            attend_part_of(as_fp32(part_of(one, b, ranges[b])), query, None, scaling=SCALING)
            for one, ranges in ((latents, far), (whole, near))
            if any(first < last for first, last in ranges[b])
        ]
        expected = parts[0][0] if len(parts) == 1 else merge(*parts[0], *parts[1])
        assert largest_difference(out[token], expected[0, :, 0]) < TOLERANCE[dtype]


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 0.03, torch.float16: 3e-3}


def as_fp32(latents: Latents) -> Latents:
    rows = [row if row.dtype == torch.uint8 else row.float() for row in latents.rows]
    return Latents(copy.deepcopy(latents.projection).float(), rows)


def test_pages_of_another_dtype_are_refused() -> None:
    projection = coded_layer(MIXED, 1, 5).projection
    numbers = torch.zeros(2, 16, 64, dtype=torch.bfloat16)
    codes = torch.zeros(2, 16, 64, dtype=torch.uint8)
    with pytest.raises(AssertionError, match=r"torch.bfloat16, not torch.float32"):
        Paged.of(numbers, codes, projection.layout, projection.storages(torch.float32))


@every_mix
@pytest.mark.parametrize("page", [1, 16])
def test_tokens_go_into_their_slots(
    decode: Any, bands: tuple[LayerBands, LayerBands], page: int
) -> None:
    latents = coded_layer(bands, 1, 7)
    projection = latents.projection
    reads = paged(latents, [[(0, 7)]], page)
    in_pages = reads.paged
    before = in_pages.numbers_KNP.clone(), in_pages.codes_KNY.clone()
    states = torch.randn(7, G, 2 * D, generator=torch.Generator().manual_seed(1))
    token_T = torch.arange(7)
    slots_T = reads.table_BX[0].long()[token_T // page] * page + token_T % page
    assert projection.coder is not None
    encode_paged(projection.coder, states, projection.order, in_pages, slots_T)
    rows = projection.encode_states(states.transpose(0, 1)[None])
    for old, plane, kind in zip(
        before, (in_pages.numbers_KNP, in_pages.codes_KNY), (0, 1), strict=True
    ):
        wanted = torch.cat([row[0].transpose(0, 1).flatten(1) for row in rows[kind::2]], dim=1)
        old.flatten(0, 1)[slots_T] = wanted
        assert torch.equal(old.view(torch.uint8), plane.contiguous().view(torch.uint8))


# ---- who decodes


def test_codes_and_halves_are_the_kernels(own: None) -> None:
    codes, ranks = coded_layer(MIXED, 1, 5), plain_layer(RANKS["odd"], 1, 5)
    query = queries(1, 1)
    assert attention._decoder(query, codes) is native.decode
    assert attention._decoder(query, ranks) is cpu.decode
    assert attention._decoder(query.bfloat16(), ranks) is native.decode
    for latents in (codes, ranks):  # which the kernel does not know
        assert attention._decoder(query.double(), latents) is not native.decode


# ---- a whole model


def test_it_generates_the_same_tokens_as_torch(own: None) -> None:
    """A left-padded batch whose buffers grow on the way."""
    subject = coded("llama")
    subject.attach(ranks=subject.ragged(1))
    ids, mask = left_padded([tokens(1, 62), tokens(1, 7, seed=1)])
    with mock.patch.object(native, "decode", wraps=native.decode) as called:
        fast = greedy(subject.model, ids, new=64, attention_mask=mask)
    assert called.call_count
    with mock.patch.object(compiled, "kernel", lambda: None):
        assert torch.equal(greedy(subject.model, ids, new=64, attention_mask=mask), fast)
    matkv.detach(subject.model)
