"""Rows of latents in a server's pages.

Shapes: K page, N token of a page, P and Y columns, X page of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch

from layers import BANDS, RANKS, coded_layer, plain_layer
from matkv.attention.kernels.native import Reads
from matkv.latents.latents import Latents
from matkv.latents.native import Paged
from one_query import D, G

LAYERS: dict[str, tuple[Any, Any]] = {
    **{name: (coded_layer, bands) for name, bands in BANDS.items()},
    **{f"ranks {name}": (plain_layer, ranks) for name, ranks in RANKS.items() if "all" not in name},
}
# Of four sequences, what they read of 60 tokens; the last one nothing.
RANGES = [[(3, 20), (41, 60)], [(0, 0), (0, 60)], [(0, 60), (60, 60)], [(5, 5), (9, 8)]]


def paged(
    latents: Latents, ranges: list[list[tuple[int, int]]], page: int, *, seed: int = 0
) -> Reads:
    """The rows in pages of one buffer, dealt out anyhow; what holds no token is not a number.

    Every sequence has the tokens up to the end of its last range.
    """
    lengths = [max(last for _, last in own) for own in ranges]
    projection, rows = latents.projection, latents.rows
    dtype, batch = rows[0].dtype, len(lengths)
    kinds = 1 if projection.coder is None else 2
    planes = [
        torch.cat([row.transpose(1, 2).flatten(2) for row in rows[kind::kinds]], dim=2)
        for kind in range(kinds)
    ]
    sizes = [plane.shape[2] * plane.element_size() for plane in planes] + [0] * (2 - kinds)
    needed = [-(-length // page) for length in lengths]
    order = torch.randperm(
        sum(needed) + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    parts = [page * size for size in sizes]
    memory = torch.full((len(order), sum(parts) // 8 * 8 + 8), 255, dtype=torch.uint8)
    numbers, codes, _ = memory.split([*parts, memory.shape[1] - sum(parts)], dim=1)
    numbers_KNP = numbers.view(dtype).unflatten(1, (page, sizes[0] // dtype.itemsize))
    codes_KNY = codes.unflatten(1, (page, sizes[1]))
    table = torch.full((batch, max(needed) + 1), -1, dtype=torch.int32)
    taken = iter(order.tolist())
    for b, length in enumerate(lengths):
        for t in range(length):
            if t % page == 0:
                table[b, t // page] = next(taken)
            place = table[b, t // page], t % page
            numbers_KNP[place] = planes[0][b, t]
            if kinds == 2:
                codes_KNY[place] = planes[1][b, t]
    storages = projection.storages(dtype)
    rows_in_pages = Paged.of(numbers_KNP, codes_KNY, projection.layout, storages)
    return Reads(rows_in_pages, table, torch.tensor(ranges, dtype=torch.int32))


def part_of(latents: Latents, b: int, ranges: list[tuple[int, int]]) -> Latents:
    """One sequence's rows of some tokens."""
    return Latents(latents.projection, [
        torch.cat([row[b : b + 1, :, first:last] for first, last in ranges], dim=2)
        for row in latents.rows
    ])  # fmt: skip


def whole_layer(batch: int, tokens: int) -> Latents:
    """Rows of keys and values at full width, as they are."""
    whole = plain_layer(((D,) * G, (D,) * G), batch, tokens)
    identity = torch.eye(D).expand(G, D, D)
    whole.projection.query[..., :D], whole.projection.output[:, -D:] = identity, identity
    return whole
