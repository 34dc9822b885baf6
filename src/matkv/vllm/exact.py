"""Tokens kept exact in pages of their own: the first of a sequence and those before the newest.

A row holds keys and values of all layers at full width. vLLM keeps the pages of the first `sink`
and the last `recent` tokens: see the adapter. All tokens are in pages of latents too.

Shapes: B sequence, X page of a sequence, K page, E token of a page, T token, C exact token that a
query reads, S sink token, G KV head, J query heads of a KV head, H query head, Q = 1, D head dim,
F = 2 D, [key | value].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matkv.attention.kernels import native
from matkv.attention.masks import additive
from matkv.attention.parts import attend_part
from matkv.latents.latents import Exact
from matkv.latents.native import Paged


@dataclass(frozen=True)
class ExactRows:
    """One layer's part of the pages, and how many tokens are exact."""

    rows_KEGF: Tensor
    paged: Paged
    sink: int
    recent: int

    @classmethod
    def bind(
        cls,
        cache: Tensor,
        first: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        exact: tuple[int, int],
    ) -> ExactRows:
        """The layer whose columns begin at byte `first` of a token, in a cache [K 1 E bytes]."""
        pages, _, tokens, width = cache.shape
        size = dtype.itemsize
        flat = torch.empty(0, dtype=torch.uint8, device=cache.device)
        flat.set_(cache.untyped_storage())
        whole = flat[: len(flat) - len(flat) % size].view(dtype)
        rows_KEGF = whole.as_strided(
            (pages, tokens, heads, 2 * dim),
            (cache.stride(0) // size, width // size, 2 * dim, 1),
            (cache.storage_offset() + first) // size,
        )
        return cls(rows_KEGF, Paged.whole(rows_KEGF), *exact)

    @property
    def reach(self) -> int:
        """How many of the last tokens a query reads exactly: its own, too."""
        return self.recent + 1 if self.recent else 0

    def write(self, states_TGF: Tensor, slots_T: Tensor) -> None:
        """New tokens; those whose page is not kept are in page 0, which nobody reads."""
        size = self.rows_KEGF.shape[1]
        self.rows_KEGF[slots_T // size, slots_T % size] = states_TGF

    def read(self, pages_BX: Tensor, place_BC: Tensor) -> Tensor:
        """The tokens at some places of their sequences.  [BGCF]"""
        size = self.rows_KEGF.shape[1]
        pages_BC = pages_BX.gather(1, place_BC // size)
        return self.rows_KEGF[pages_BC, place_BC % size].transpose(1, 2)

    def near(
        self, query_BHQD: Tensor, reads: native.Reads, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """What the newest tokens of sequences read exactly, and the log of the weights' sum.

        By torch alone, every range as long as it may be.  [BHQD -> BHQD, BHQ]
        """
        query_BGJD = query_BHQD[:, :, 0].unflatten(1, (self.rows_KEGF.shape[2], -1))
        ranges_BR2 = reads.ranges_BR2.long()
        places, reading = [], []
        for r, size in enumerate((self.sink, self.reach)):
            place_BC = ranges_BR2[:, r, 1:] + torch.arange(-size, 0, device=query_BGJD.device)
            places.append(place_BC)
            reading.append(place_BC >= ranges_BR2[:, r, :1])
        is_read_BC = torch.cat(reading, dim=1)
        exact_BGCF = self.read(reads.table_BX, torch.cat(places, dim=1).where(is_read_BC, 0))
        exact_BGCF = exact_BGCF.where(is_read_BC[:, None, :, None], 0)
        D, J = query_BGJD.shape[3], query_BGJD.shape[2]
        bias = additive(is_read_BC[:, None, None], exact_BGCF.dtype).expand(-1, -1, J, -1)
        out_BGJD, lse_BGJ = attend_part(
            query_BGJD.to(exact_BGCF.dtype),
            exact_BGCF[..., :D],
            exact_BGCF[..., D:],
            bias,
            scaling=scaling,
        )
        return out_BGJD.flatten(1, 2)[:, :, None], lse_BGJ.flatten(1, 2)[..., None]

    def span(self, states_TGF: Tensor, pages_X: Tensor, length: int) -> Exact:
        """What several new tokens, the last of a sequence, read exactly."""
        first = length - len(states_TGF)
        before = torch.arange(max(0, first - self.recent), first, device=pages_X.device)
        new_BGTF = states_TGF.transpose(0, 1)[None]
        recent_BGKF = torch.cat((self.read(pages_X[None], before[None]), new_BGTF), dim=2)
        sink_BGSF = new_BGTF.new_zeros(1, new_BGTF.shape[1], self.sink, new_BGTF.shape[3])
        held = torch.arange(min(self.sink, length), device=pages_X.device)
        sink_BGSF[:, :, : len(held)] = self.read(pages_X[None], held[None])
        return Exact(recent_BGKF, sink_BGSF, length, self.reach)

    def far(self, length: int) -> slice:
        """Which tokens the newest one reads as latents."""
        return slice(self.sink, max(self.sink, length - self.reach))
