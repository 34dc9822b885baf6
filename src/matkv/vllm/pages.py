"""What the pages of a layer hold: rows of latents at their exact bytes.

A page is two planes: a row [P] of columns in the model's dtype for every token, then a row [Y] of
bytes, the gains and codes. Heads follow one another in the projection's order, each with its key
and its value, nothing padded; so every number lies where its dtype wants it.

Shapes: K page, N token of a page, T token, B sequence, X page of a sequence, G KV head, H heads of
one bucket, C columns of a head, P columns of all heads, Y bytes of all heads, F = 2 D, [key |
value].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matkv.errors import CacheError
from matkv.latents.layer import LayerProjection
from matkv.latents.native import Paged, Storage, can_encode, encode_paged


@dataclass(frozen=True)
class Layout:
    """The row of one token.

    `storages` are heads, columns and dtype of the projection's tensors, `heads` its `layout`.
    """

    storages: tuple[Storage, ...]
    dtype: torch.dtype
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, projection: LayerProjection, dtype: torch.dtype) -> Layout:
        return cls(tuple(projection.storages(dtype)), dtype, projection.layout)

    def columns(self, *, codes: bool) -> int:
        """P, or Y for codes."""
        return sum(heads * columns for heads, columns, _ in self._plane(codes))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.columns(codes=False) * self.dtype.itemsize + self.columns(codes=True)

    def bind(self, cache: Tensor) -> Pages:
        """The pages in a cache of bytes, [K 1 N bytes] or wider, a page in one piece.

        Raises:
            CacheError: its pages do not lie where numbers of the dtype can be read.
        """
        pages, _, tokens, width = cache.shape
        size, stride = self.dtype.itemsize, cache.stride(0)
        numbers, codes = self.columns(codes=False), self.columns(codes=True)
        plane = tokens * numbers * size
        offset = cache.storage_offset()
        if (stride % size or offset % size) and numbers:
            raise CacheError(
                f"pages of {stride} bytes from byte {offset} on are not aligned to {self.dtype}: "
                "ask for a block size that is a multiple of 16"
            )
        assert cache.dtype.itemsize == 1 and width >= self.token_bytes and cache.stride(2) == width
        flat = torch.empty(0, dtype=torch.uint8, device=cache.device)
        flat.set_(cache.untyped_storage())
        whole = flat[: len(flat) - len(flat) % size].view(self.dtype)
        numbers_KNP = whole.as_strided(
            (pages, tokens, numbers), (stride // size, numbers, 1), offset // size
        )
        codes_KNY = flat.as_strided((pages, tokens, codes), (stride, codes, 1), offset + plane)
        return Pages(self, Paged.of(numbers_KNP, codes_KNY, self.heads, self.storages))

    def _plane(self, codes: bool) -> list[Storage]:
        return [one for one in self.storages if (one[2] == torch.uint8) == codes]


@dataclass(frozen=True)
class Pages:
    """All pages of one layer."""

    layout: Layout
    paged: Paged

    @property
    def tokens(self) -> int:
        """N."""
        return self.paged.tokens

    def put(self, projection: LayerProjection, states_TGF: Tensor, slots_T: Tensor) -> None:
        """Rows of the keys and values of new tokens, `joined`, into their slots."""
        states_BGTF, coder = states_TGF.transpose(0, 1)[None], projection.coder
        if coder is not None and can_encode(coder, states_BGTF):
            encode_paged(coder, states_TGF, projection.order, self.paged, slots_T)
        else:
            self.write(projection.encode_states(states_BGTF), slots_T)

    def write(self, rows: Sequence[Tensor], slots_T: Tensor) -> None:
        """Rows of new tokens, [1HTC] as `LayerProjection.encode` gives them, into their slots."""
        page_T, place_T = slots_T // self.tokens, slots_T % self.tokens
        for codes, plane in self._planes():
            if plane.shape[2]:
                parts = [
                    one[0].transpose(0, 1).flatten(1)
                    for one, storage in zip(rows, self.layout.storages, strict=True)
                    if (storage[2] == torch.uint8) == codes
                ]
                plane[page_T, place_T] = torch.cat(parts, dim=1)

    def read(self, pages_BX: Tensor) -> list[Tensor]:
        """Rows of whole pages, a tensor [B H T C] for every storage, T = X N."""
        planes = {
            codes: iter(self._split(plane[pages_BX].flatten(1, 2), codes))
            for codes, plane in self._planes()
        }
        return [next(planes[dtype == torch.uint8]) for _, _, dtype in self.layout.storages]

    def _planes(self) -> tuple[tuple[bool, Tensor], ...]:
        """Whether a plane is of codes, and it."""
        return (False, self.paged.numbers_KNP), (True, self.paged.codes_KNY)

    def _split(self, plane_BTX: Tensor, codes: bool) -> list[Tensor]:
        storages = [one for one in self.layout.storages if (one[2] == torch.uint8) == codes]
        parts = plane_BTX.split([heads * columns for heads, columns, _ in storages], dim=2)
        return [
            part.unflatten(2, (heads, columns)).transpose(1, 2)
            for part, (heads, columns, _) in zip(parts, storages, strict=True)
        ]
