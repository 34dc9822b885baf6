"""The Triton kernels on pages against the rows one by one, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from explicit import attend_explicit
from matkv.attention.kernels.native import Reads
from matkv.attention.latent import attend_part_of
from matkv.attention.parts import merge
from matkv.latents.latents import Latents
from one_query import SCALING, kernel, queries
from paging import LAYERS, paged, part_of, whole_layer
from tiny import largest_difference

every_layer = pytest.mark.parametrize("made", LAYERS.values(), ids=LAYERS)


@pytest.fixture(scope="module")
def gpu_paged() -> Iterator[Any]:
    with kernel("gpu_paged") as module:
        yield module


def step_of(
    module: Any, latents: Latents, query: Tensor, reads: Reads, near: Reads | None = None,
    tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.full_like(query, torch.nan)
    with torch.no_grad():
        module.attend_paged(
            query, out, latents.projection, reads, near, tokens_B=tokens, longest=131,
            scaling=SCALING,
        )  # fmt: skip
    return out


@every_layer
@pytest.mark.parametrize("page", [16, 48])
def test_pages_equal_rows(gpu_paged: Any, made: Any, page: int) -> None:
    make, table = made
    ranges = [(0, 131), (0, 1), (7, 16), (70, 77), (9, 9)]
    latents, query = make(table, 5, 131), queries(5, 3)
    out = step_of(
        gpu_paged, latents, query[:, :, 0], paged(latents, [[one] for one in ranges], page)
    )
    for b, one in enumerate(ranges[:4]):
        own = part_of(latents, b, [one])
        expected = attend_explicit(own, query[b : b + 1], None, scaling=SCALING)
        assert largest_difference(out[b], expected[0, :, 0]) < 2e-6
    assert not out[4].any()


@every_layer
def test_a_step_puts_exact_tokens_and_latents_together(gpu_paged: Any, made: Any) -> None:
    """Of five tokens two are those of sequences."""
    make, table = made
    latents, whole = make(table, 2, 60), whole_layer(2, 60)
    far, near = [[(4, 50)], [(4, 1)]], [[(0, 4), (50, 60)], [(0, 3), (3, 3)]]
    mixed = queries(5, 3)[:, :, 0]
    tokens = torch.tensor([3, 1])
    in_pages = paged(latents, far, 16), paged(whole, near, 4, seed=1)
    out = step_of(gpu_paged, latents, mixed, *in_pages, tokens)
    assert bool(out[[0, 2, 4]].isnan().all())
    for b, token in enumerate(tokens.tolist()):
        query = mixed[None, token, :, None]
        parts = [
            attend_part_of(part_of(one, b, ranges[b]), query, None, scaling=SCALING)
            for one, ranges in ((latents, far), (whole, near))
            if any(first < last for first, last in ranges[b])
        ]
        expected = parts[0][0] if len(parts) == 1 else merge(*parts[0], *parts[1])
        assert largest_difference(out[token], expected[0, :, 0]) < 3e-6
