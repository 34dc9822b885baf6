"""A layer's bases at given ranks: the matrices that its heads use.

`LayerProjection` makes rows for the cache, heads sorted into buckets of equal rows.

Shapes: B batch, H query head, G KV head, N heads of one bucket, J query heads of a KV head, Q query
position, X = J Q, T token, D head dim, C row columns, M view columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from matkv.bases.maps import Maps
from matkv.codes import Bands, plain_bands
from matkv.errors import RankError
from matkv.latents.coding import Coder, SideCoding, row_layout, row_sizes
from matkv.latents.native import can_encode, encode
from matkv.ranks import LayerRanks, RankTable

# Columns that the query and output maps have to spare, zeros, for kernels that prefer wider views.
SPARE = 8
# torch does elementwise work of up to so many numbers in the calling thread. A product as small as
# that, 14 µs of work, would take 80 on a CPU's two threads: waking them costs more than they do.
ONE_THREAD = 1 << 15


@dataclass(frozen=True)
class Bucket:
    """The heads of one layer whose rows are equally wide, computed in one go.

    Where there are codes, their bands are equal too.

    A token's row is [key latent | value latent], `row_width` columns, nothing padded; where one
    ends and the other starts may differ from head to head. `width` is the largest rank of them all:
    the views row[:width] and row[-width:] take in every key and every value, and their equal widths
    are what fast attention kernels ask for. What else they take in, the zeros of the layer's
    `query` and `output` maps undo. `heads` are places in the layer's sorted order.
    """

    heads: slice
    row_width: int
    width: int


class LayerProjection(nn.Module):
    """All KV heads of one layer at given ranks, sorted into buckets of equal row widths once.

    Buffers, heads in sorted order: `ranks` [G 2]; `encode_rows` [G 2D C] makes rows of [key|value];
    `query` [G D M] goes with the first columns of a row, and is zero from the key rank on;
    `output` [G M D] goes with the last columns, and is zero but for its last value-rank rows.
    `sink` first and `recent` last tokens of a sequence are kept exact. `source` names the bases:
    latents of projections of one source are prefixes of each other, and equal at one `identity`.
    `window` is the sliding window of a layer that has one. `coding` says which columns are kept as
    codes; `coder` makes and reads them. `layout` says where in a row every head's key and value
    are, see `row_layout`.

    Raises:
        RankError: the number of ranks or a rank does not fit the maps.
    """

    order: Tensor
    place: Tensor
    ranks: Tensor
    encode_rows: Tensor
    query: Tensor
    output: Tensor

    def __init__(
        self,
        key: Maps,
        value: Maps,
        key_ranks: LayerRanks,
        value_ranks: LayerRanks,
        *,
        sink: int = 0,
        recent: int = 0,
        window: int | None = None,
        source: str = "",
        coding: tuple[SideCoding, SideCoding] | None = None,
    ) -> None:
        super().__init__()
        heads, dim = key.encode_XDD.shape[:2]
        for ranks in (key_ranks, value_ranks):
            if len(ranks) != heads or not all(0 <= rank <= dim for rank in ranks):
                raise RankError(f"ranks {ranks} do not fit {heads} KV heads of dimension {dim}")
        self.kv_heads, self.head_dim = heads, dim
        self.sink, self.recent, self.window = sink, recent, window
        bands = _bands(key_ranks, value_ranks, coding)
        self.source, self.identity = source, (source, tuple(bands), sink, recent)
        pairs = list(zip(key_ranks, value_ranks, strict=True))
        # Without codes rows of equal widths go together, whatever their ranks.
        alike = [(sum(pairs[head]), () if coding is None else bands[head]) for head in range(heads)]
        order = sorted(range(heads), key=lambda head: alike[head])
        pairs, alike = [pairs[head] for head in order], [alike[head] for head in order]
        self.layout = tuple(side for head in order for side in row_layout(bands[head]))
        self.is_sorted = order == list(range(heads))
        self.buckets = _buckets(pairs, alike)
        self.highest_ranks = max(key_ranks), max(value_ranks)
        key, value = _picked(key, order), _picked(value, order)
        self.coder: Coder | None = None
        if coding is not None:
            key_coding, value_coding = (side.picked(order) for side in coding)
            self.coder = Coder(key, value, key_coding, value_coding)
            key, value = _in_units(key, key_coding), _in_units(value, value_coding)
        tensors = {
            "order": torch.tensor(order),
            "place": torch.tensor(order).argsort(),
            "ranks": torch.tensor(pairs, dtype=torch.int32),
            **_row_maps(key, value, pairs),
        }
        if self.coder is not None:  # which has maps of its own
            tensors["encode_rows"] = tensors["encode_rows"].new_zeros(heads, 0, 0)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def keeps_exact(self) -> bool:
        """Whether some tokens keep all their coordinates."""
        return self.sink > 0 or self.recent > 0

    @property
    def width(self) -> int:
        """M, the columns of `query` and the rows of `output`."""
        return self.query.shape[-1]

    def sort(self, x_BGXX: Tensor) -> Tensor:
        """Put heads, dimension 1, into the order of the buckets."""
        return x_BGXX if self.is_sorted else x_BGXX.index_select(1, self.order)

    def unsort(self, x_BGXX: Tensor) -> Tensor:
        """Inverse of `sort`."""
        return x_BGXX if self.is_sorted else x_BGXX.index_select(1, self.place)

    def encode(self, key_BGTD: Tensor, value_BGTD: Tensor) -> list[Tensor]:
        """Rows of new tokens, a tensor [BNTC] per bucket, or with codes the two of `Coder`."""
        return self.encode_states(joined(key_BGTD, value_BGTD))

    def encode_states(self, states_BGTF: Tensor) -> list[Tensor]:
        """`encode` of states that are `joined`."""
        if self.coder is not None and can_encode(self.coder, states_BGTF):
            buckets = [bucket.heads for bucket in self.buckets]
            storages = self.storages(states_BGTF.dtype)
            return encode(self.coder, states_BGTF, self.order, self.layout, storages, buckets)
        states_BGTF = self.sort(states_BGTF)
        if self.coder is not None:
            y_BGTF = self.coder.coordinates(states_BGTF)
            rows = [self.coder.rows(y_BGTF, b.heads, states_BGTF.dtype) for b in self.buckets]
            return [part for parts in rows for part in parts]
        rows_BGTC = per_head(states_BGTF, self.encode_rows)
        return [rows_BGTC[:, b.heads, :, : b.row_width] for b in self.buckets]

    def latents(self, rows: list[Tensor]) -> list[Tensor]:
        """What attention reads of rows: a tensor [BNTC] per bucket."""
        coder = self.coder
        if coder is None:
            return rows
        pairs = zip(rows[::2], rows[1::2], self.buckets, strict=True)
        return [coder.latents([plain, codes], b.heads) for plain, codes, b in pairs]

    def storages(self, dtype: torch.dtype) -> list[tuple[int, int, torch.dtype]]:
        """Heads, columns and dtype of every tensor of the rows of states in `dtype`."""
        sizes = []
        for bucket in self.buckets:
            heads = bucket.heads.stop - bucket.heads.start
            if self.coder is None:
                sizes.append((heads, bucket.row_width, dtype))
                continue
            plain, codes = row_sizes(self.coder.bands[bucket.heads.start])
            sizes += [(heads, plain, dtype), (heads, codes, torch.uint8)]
        return sizes

    def enter(self, query_BHQD: Tensor) -> Tensor:
        """Queries in sorted order, a group's heads as positions of their KV head.  [-> BGXD]"""
        return self.sort(query_BHQD.unflatten(1, (self.kv_heads, -1)).flatten(2, 3))

    def leave(self, out_BGXD: Tensor, queries: int) -> Tensor:
        """Inverse of `enter`.  [-> BHQD]"""
        out_BHQD: Tensor = self.unsort(out_BGXD).unflatten(2, (-1, queries)).flatten(1, 2)
        return out_BHQD


def joined(key_BGTD: Tensor, value_BGTD: Tensor) -> Tensor:
    """Keys and values as one row a token, [key | value].  [BGTF], F = 2D"""
    return torch.cat((key_BGTD, value_BGTD), dim=-1)


def per_head(x_BGXY: Tensor, map_GYZ: Tensor) -> Tensor:
    """Every head times its own matrix, as one batched product.  [BGXY, GYZ -> BGXZ]"""
    B, G, X, Y = x_BGXY.shape
    is_small = x_BGXY.device.type == "cpu" and B * X * map_GYZ.numel() <= ONE_THREAD
    if is_small and not torch.is_autocast_enabled("cpu"):  # which only casts matrix products
        products_BGXYZ = x_BGXY.float()[..., None] * map_GYZ[:, None]
        return products_BGXYZ.sum(-2).to(x_BGXY.dtype)
    x_GXY = x_BGXY.transpose(0, 1).reshape(G, B * X, Y)
    out_BGXZ: Tensor = torch.bmm(x_GXY, map_GYZ).unflatten(1, (B, X)).transpose(0, 1)
    return out_BGXZ


def _picked(maps: Maps, order: list[int]) -> Maps:
    return Maps(maps.encode_XDD[order], maps.decode_XDD[order])


def _bands(
    key_ranks: LayerRanks, value_ranks: LayerRanks, coding: tuple[SideCoding, SideCoding] | None
) -> list[tuple[Bands, Bands]]:
    """The bands of every head's key and value.

    Raises:
        RankError: those of `coding` do not add up to the ranks.
    """
    if coding is None:
        sides = [tuple(map(plain_bands, ranks)) for ranks in (key_ranks, value_ranks)]
    else:
        sides = [side.bands for side in coding]
    for ranks, bands in zip((key_ranks, value_ranks), sides, strict=True):
        if tuple(map(sum, bands)) != tuple(ranks):
            raise RankError(f"bands {bands} do not add up to the ranks {ranks}")
    return list(zip(*sides, strict=True))


def _buckets(pairs: list[tuple[int, int]], alike: list[tuple[int, Any]]) -> list[Bucket]:
    """Neighbours that are alike: the first of `alike` is the sum of ranks."""
    buckets, first = [], 0
    for (row_width, _), group in groupby(range(len(pairs)), key=alike.__getitem__):
        members = [pairs[head] for head in group]
        heads = slice(first, first + len(members))
        buckets.append(Bucket(heads, row_width, max(map(max, members))))
        first = heads.stop
    return buckets


def _in_units(maps: Maps, coding: SideCoding) -> Maps:
    """Maps whose way back takes latents in units of a step."""
    return Maps(maps.encode_XDD, maps.decode_XDD * coding.units()[:, None])


def _widths(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    """C, columns of the rows, and M, of the maps of queries and outputs."""
    C = max(map(sum, pairs))
    return C, min(C, max(map(max, pairs)) + SPARE)


def projections_nbytes(table: RankTable, dtype: torch.dtype) -> int:
    """Bytes of the buffers of a `LayerProjection` for every compressed layer of `table`."""
    total = 0
    for layer in table.geometry.compressed:
        shape = table.geometry.layers[layer]
        C, M = _widths(list(zip(table.key[layer], table.value[layer], strict=True)))
        # A head has maps [2D C], [D M] and [M D]; its order and place take 8 bytes, its ranks 4.
        # Where there are codes, the first are two of [D D], and scales and steps take [2D] each.
        rows = shape.head_dim + 2 if table.is_coded(layer) else C
        maps = shape.head_dim * (2 * rows + 2 * M) * dtype.itemsize
        total += shape.kv_heads * (maps + 2 * 8 + 2 * 4)
    return total


def _row_maps(key: Maps, value: Maps, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
    new, (G, D, _) = key.encode_XDD.new_zeros, key.encode_XDD.shape
    C, M = _widths(pairs)
    encode_GDC, query_GDM, output_GMD = new(G, 2 * D, C), new(G, D, M), new(G, M, D)
    for g, (r_key, r_value) in enumerate(pairs):
        encode_GDC[g, :D, :r_key] = key.encode_XDD[g, :, :r_key]
        encode_GDC[g, D:, r_key : r_key + r_value] = value.encode_XDD[g, :, :r_value]
        query_GDM[g, :, :r_key] = key.decode_XDD[g, :, :r_key]
        output_GMD[g, M - r_value :] = value.decode_XDD[g, :, :r_value].T
    return {"encode_rows": encode_GDC, "query": query_GDM, "output": output_GMD}
