"""Pages: their bytes, what is written is read, and attention on them is attention on whole rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from coded import KINDS
from matkv.attention.latent import attend
from matkv.cache.layer import LatentLayer
from matkv.errors import CacheError
from matkv.latents import compiled
from matkv.latents.layer import LayerProjection
from matkv.ranks import RankTable
from matkv.vllm import attention
from matkv.vllm import pages as paging
from matkv.vllm.attention import Near, Step, attend_step
from matkv.vllm.exact import ExactRows
from matkv.vllm.pages import Layout, Pages
from matkv.vllm.shards import Shard, projection_of, widest_row

SEEDS = range(3)
PAGE, COUNT = 16, 40


def layer_of(kind: str, seed: int, layer: int = 1) -> tuple[LayerProjection, RankTable]:
    subject = KINDS[kind]("llama")
    table = subject.ragged(seed)
    return projection_of(subject.artifact, table, layer, Shard()), table


def empty(layout: Layout, *, spare: int = 0, dirt: float = torch.nan) -> Pages:
    """Pages full of what is no number, `spare` bytes a token wider than need be, layers between."""
    width = max(1, layout.token_bytes + spare)
    whole = torch.full((2 * COUNT * PAGE * width // 4 + 1,), dirt).view(torch.uint8)
    page = PAGE * width
    return layout.bind(whole.as_strided((COUNT, 1, PAGE, width), (2 * page, page, width, 1), page))


def states(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Queries [THD], keys and values [TGD]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, n, 16, generator=generator).to(dtype) for n in (4, 2, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_takes_the_bytes_that_its_table_promises(
    kind: str, seed: int, dtype: torch.dtype
) -> None:
    table = layer_of(kind, seed)[1]
    layouts = [Layout.of(layer_of(kind, seed, one)[0], dtype) for one in range(3)]
    assert sum(one.token_bytes for one in layouts) == table.bytes_per_token(dtype)
    widths = [widest_row(table, one, 1, dtype) for one in range(3)]
    assert widths == [max(1, one.token_bytes) for one in layouts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("spare", [0, 3])
def test_what_is_written_is_read(kind: str, seed: int, spare: int) -> None:
    projection, _ = layer_of(kind, seed)
    pages = empty(Layout.of(projection, torch.float32), spare=spare)
    _, key, value = states(40, seed)
    rows = projection.encode(key.transpose(0, 1)[None], value.transpose(0, 1)[None])
    table_X = torch.tensor([7, 0, 12])
    token_T = torch.arange(40)
    pages.write(rows, table_X[token_T // PAGE] * PAGE + token_T % PAGE)
    for one, other in zip(pages.read(table_X[None]), rows, strict=True):
        assert torch.equal(one[:, :, :40], other)


def test_pages_that_are_not_aligned_are_refused() -> None:
    layout = Layout(((1, 1, torch.float32), (1, 1, torch.uint8)), torch.float32, ((), ()))
    cache = torch.zeros(2, 1, 3, 5, dtype=torch.uint8)
    with pytest.raises(CacheError, match="multiple of 16"):
        layout.bind(cache)


BEFORES, NEWS = [0, 33, 5, 16, 50], [20, 1, 1, 7, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("exact", [(0, 0), (4, 8), (0, 3), (2, 0), (4, 32)])
@pytest.mark.parametrize("by", ["torch", "compiled"])
def test_a_step_is_attention_of_every_sequence_by_itself(
    kind: str, seed: int, exact: tuple[int, int], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of one new token and of several, some with earlier tokens, pages in any order."""
    if by == "torch":
        monkeypatch.setattr(attention, "_has_kernel", lambda query: False)
        monkeypatch.setattr(paging, "can_encode", lambda *_: False)
    elif compiled.kernel() is None:
        pytest.skip("there is no C compiler")
    projection, _ = layer_of(kind, seed)
    pages = empty(Layout.of(projection, torch.float32))
    rows = exact_rows(exact) if any(exact) else None
    order = torch.randperm(COUNT - 1, generator=torch.Generator().manual_seed(seed)) + 1
    pages_BX, exact_BX = order[:20].view(5, 4), torch.arange(1, 5 * 20 + 1).view(5, 20)
    whole = [
        states(b + n, 10 * seed + i) for i, (b, n) in enumerate(zip(BEFORES, NEWS, strict=True))
    ]

    def run(counts: list[int], ends: list[int], chosen: list[int]) -> Tensor:
        step = step_of(pages_BX[chosen], PAGE, counts, ends)
        near = None
        if rows is not None:
            near = Near(rows, step_of(exact_BX[chosen], EXACT_PAGE, counts, ends))
        parts = [
            [x[end - count : end] for x in whole[b]]
            for b, count, end in zip(chosen, counts, ends, strict=True)
        ]
        query, key, value = (torch.cat(one) for one in zip(*parts, strict=True))
        out = torch.full_like(query, torch.nan)
        attend_step(pages, projection, step, query, key, value, out, scaling=0.3, near=near)
        return out

    earlier = [b for b in range(5) if BEFORES[b]]
    counts = [BEFORES[b] for b in earlier]
    run(counts, counts, earlier)
    out = run(NEWS, [b + n for b, n in zip(BEFORES, NEWS, strict=True)], list(range(5)))
    for before, one, got in zip(BEFORES, whole, out.split(NEWS), strict=True):
        wanted = by_the_cache(projection, exact, one, before)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


EXACT_PAGE = 4


def exact_rows(exact: tuple[int, int]) -> ExactRows:
    """Pages of exact tokens full of what is no number: of three layers, this is the second."""
    width, page = 3 * 2 * 2 * 16 * 4, 3 * 2 * 2 * 16 * 4 * EXACT_PAGE
    whole = torch.full((120 * page // 4,), torch.nan).view(torch.uint8)
    cache = whole.as_strided((110, 1, EXACT_PAGE, width), (page + 64, page, width, 1), 64)
    return ExactRows.bind(cache, width // 3, 2, 16, torch.float32, exact)


def step_of(pages_BX: Tensor, size: int, counts: list[int], ends: list[int]) -> Step:
    """New tokens of sequences that have so many afterwards."""
    slots = [
        pages_BX[b, t // size] * size + t % size
        for b, (count, end) in enumerate(zip(counts, ends, strict=True))
        for t in range(end - count, end)
    ]
    lengths_B = torch.tensor(ends, dtype=torch.int32)
    return Step.of(pages_BX.int(), torch.stack(slots), lengths_B, [0, *accumulate(counts)], ends)


def by_the_cache(
    projection: LayerProjection, exact: tuple[int, int], whole: tuple[Tensor, ...], before: int
) -> Tensor:
    """What matkv's own cache makes of the tokens from `before` on.  [THD]"""
    own = copy.copy(projection)
    own.sink, own.recent = exact
    layer = LatentLayer(own)
    query, key, value = (x.transpose(0, 1)[None] for x in whole)
    for part in [slice(0, before), slice(before, None)] if before else [slice(None)]:
        latents, _ = layer.update(key[:, :, part], value[:, :, part])
    out_BHQD = attend(latents, query[:, :, before:], None, scaling=0.3)
    return out_BHQD[0].transpose(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_the_heads_of_the_whole(kind: str) -> None:
    subject = KINDS[kind]("llama")
    table = subject.ragged(1)
    _, key, value = (x.transpose(0, 1)[None] for x in states(9, 0))
    whole = projection_of(subject.artifact, table, 1, Shard())
    rows = whole.latents(whole.encode(key, value))
    found: dict[int, Tensor] = {}
    for bucket, one in zip(whole.buckets, rows, strict=True):
        for n, head in enumerate(whole.order[bucket.heads].tolist()):
            found[head] = one[:, n]
    for process in range(2):
        part = projection_of(subject.artifact, table, 1, Shard(process, 2))
        (got,) = part.latents(part.encode(key[:, process, None], value[:, process, None]))
        torch.testing.assert_close(got[:, 0], found[process])
    halves = [
        Layout.of(projection_of(subject.artifact, table, 1, Shard(p, 2)), torch.float32)
        for p in range(2)
    ]
    assert widest_row(table, 1, 2, torch.float32) == max(1, *(h.token_bytes for h in halves))


def test_heads_are_dealt_out_in_order_and_shared_where_they_are_few() -> None:
    assert [Shard(p, 2).heads(4) for p in range(2)] == [[0, 1], [2, 3]]
    assert [Shard(p, 4).heads(2) for p in range(4)] == [[0], [0], [1], [1]]


def test_a_layer_without_any_columns_still_has_pages() -> None:
    subject = KINDS["ranks"]("llama")
    none = tuple((0,) * shape.kv_heads for shape in subject.geometry.layers)
    table = replace(RankTable.full(subject.geometry), key=none, value=none)
    assert widest_row(table, 0, 1, torch.float32) == 1
    projection = projection_of(subject.artifact, table, 0, Shard())
    query, key, value = states(3, 0)
    pages = empty(Layout.of(projection, torch.float32))
    step = step_of(torch.tensor([[1]]), PAGE, [3], [3])
    out = torch.full_like(query, torch.nan)
    attend_step(pages, projection, step, query, key, value, out, scaling=1.0)
    assert torch.equal(out, torch.zeros_like(out))
