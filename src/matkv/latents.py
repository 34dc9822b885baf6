"""A layer's bases at given ranks: the matrices that its heads use.

`LayerProjection` makes latents for the cache, heads sorted into buckets of equal ranks;
`GatedProjection` keeps full width and gates columns, for training and search.

Shapes: B batch, H query head, G KV head, N heads of one bucket, J query heads of a KV head, Q query
position, T token, D head dim, R rank, C row columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matkv.errors import RankError
from matkv.projection import Maps
from matkv.ranks import LayerRanks


class Bucket(nn.Module):
    """The heads of one layer that share a key rank and a value rank, computed in one go.

    A token's row is [key latent | value latent], R_key + R_value columns wide, nothing padded. With
    m = max(R_key, R_value), the views row[:m] and row[-m:] have equal widths, which is what fast
    attention kernels ask for. The other side's columns that these views take in are undone by the
    maps: `query` has zeros where row[:m] holds values, `output` where row[-m:] holds keys.

    Buffers: encode_key [N D R_key], encode_value [N D R_value], query [N D m], output [N m D]; for
    exact tokens the maps of the dropped columns: encode_key_rest and query_rest [N D D-R_key],
    encode_value_rest [N D D-R_value], output_rest [N D-R_value D].
    """

    heads: Tensor
    encode_key: Tensor
    encode_value: Tensor
    query: Tensor
    output: Tensor
    encode_key_rest: Tensor
    encode_value_rest: Tensor
    query_rest: Tensor
    output_rest: Tensor

    def __init__(self, heads: list[int], key: Maps, value: Maps, ranks: tuple[int, int]) -> None:
        super().__init__()
        key_rank, value_rank = ranks
        self.key_rank, self.value_rank = ranks
        self.width = max(ranks)
        self.head_list = heads
        encode_key, decode_key = key.encode_GDD[heads], key.decode_GDD[heads]
        encode_value, decode_value = value.encode_GDD[heads], value.decode_GDD[heads]
        lower_value = decode_value.transpose(1, 2)
        query = decode_key[..., : self.width].clone()
        query[..., key_rank:] = 0
        output = torch.zeros_like(lower_value[:, : self.width])
        output[:, self.width - value_rank :] = lower_value[:, :value_rank]
        maps = {
            "heads": torch.tensor(heads),
            "encode_key": encode_key[..., :key_rank],
            "encode_value": encode_value[..., :value_rank],
            "query": query,
            "output": output,
            "encode_key_rest": encode_key[..., key_rank:],
            "encode_value_rest": encode_value[..., value_rank:],
            "query_rest": decode_key[..., key_rank:],
            "output_rest": lower_value[:, value_rank:],
        }
        for name, tensor in maps.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)

    @property
    def row_width(self) -> int:
        return self.key_rank + self.value_rank

    def rows(self, key_BNTD: Tensor, value_BNTD: Tensor) -> Tensor:
        """Latents of new tokens. [BNTD, BNTD -> BNTC]"""
        z_key_BNTR, z_value_BNTR = key_BNTD @ self.encode_key, value_BNTD @ self.encode_value
        return torch.cat((z_key_BNTR, z_value_BNTR), dim=-1)

    def rest(self, key_BNTD: Tensor, value_BNTD: Tensor) -> Tensor:
        """The coordinates that `rows` drops: what exact tokens store on top. [-> BNT(2D-C)]"""
        rest_key, rest_value = key_BNTD @ self.encode_key_rest, value_BNTD @ self.encode_value_rest
        return torch.cat((rest_key, rest_value), dim=-1)


class LayerProjection(nn.Module):
    """All KV heads of one layer at given ranks, sorted into buckets of equal ranks once.

    Raises:
        RankError: the number of ranks or a rank does not fit the maps.
    """

    def __init__(
        self,
        key: Maps,
        value: Maps,
        key_ranks: LayerRanks,
        value_ranks: LayerRanks,
        *,
        sink: int = 0,
        window: int = 0,
    ) -> None:
        super().__init__()
        heads, dim = key.encode_GDD.shape[:2]
        for ranks in (key_ranks, value_ranks):
            if len(ranks) != heads or not all(0 <= rank <= dim for rank in ranks):
                raise RankError(f"ranks {ranks} do not fit {heads} KV heads of dimension {dim}")
        self.kv_heads, self.head_dim = heads, dim
        self.sink, self.window = sink, window
        self.start_B: Tensor | None = None
        grouped: dict[tuple[int, int], list[int]] = {}
        for head, ranks_of_head in enumerate(zip(key_ranks, value_ranks, strict=True)):
            grouped.setdefault(ranks_of_head, []).append(head)
        self.buckets = nn.ModuleList(
            Bucket(members, key, value, ranks) for ranks, members in sorted(grouped.items())
        )
        self.bucket_list: list[Bucket] = list(self.buckets)  # type: ignore[arg-type]
        order = [head for bucket in self.bucket_list for head in bucket.head_list]
        self.register_buffer(
            "head_order",
            torch.tensor([order.index(head) for head in range(heads)]),
            persistent=False,
        )

    head_order: Tensor

    @property
    def keeps_exact(self) -> bool:
        """Whether some tokens keep all their coordinates."""
        return self.sink > 0 or self.window > 0

    def split(self, x_BGXX: Tensor) -> list[Tensor]:
        """Pick each bucket's heads along dimension 1."""
        if len(self.bucket_list) == 1:
            return [x_BGXX]
        return [x_BGXX.index_select(1, bucket.heads) for bucket in self.bucket_list]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Inverse of `split`."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=1).index_select(1, self.head_order)

    def encode(self, key_BGTD: Tensor, value_BGTD: Tensor) -> list[Tensor]:
        """Rows of new tokens, a tensor [BNTC] per bucket."""
        pairs = zip(self.bucket_list, self.split(key_BGTD), self.split(value_BGTD), strict=True)
        return [bucket.rows(key_BNTD, value_BNTD) for bucket, key_BNTD, value_BNTD in pairs]


class GatedProjection(nn.Module):
    """One layer at full width with a gate on every column: for training and search.

    A column with gate 0 is dropped, with gate 1 kept, so that ranks change without new matrices and
    gradients reach bases and gates. With the gates of a rank table, attention on what `enter` makes
    equals `LayerProjection` at that table.

    `key_gate` and `value_gate` are [GD], or [BGD] for one table a sequence.
    """

    def __init__(self, key: Maps, value: Maps) -> None:
        super().__init__()
        self.key_maps, self.value_maps = key, value
        heads, dim = key.encode_GDD.shape[:2]
        self.key_gate = self.value_gate = torch.ones(heads, dim, device=key.encode_GDD.device)

    def enter(
        self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries, keys and values, and gate keys and values."""
        dtype, heads = query_BHQD.dtype, key_BGTD.shape[1]
        decode_GDD = self.key_maps.decode_GDD.to(dtype)
        query_BGJQD = query_BHQD.unflatten(1, (heads, -1)) @ decode_GDD[:, None]
        key_BGTD = key_BGTD @ self.key_maps.encode_GDD.to(dtype)
        value_BGTD = value_BGTD @ self.value_maps.encode_GDD.to(dtype)
        key_gate, value_gate = self.key_gate.to(dtype), self.value_gate.to(dtype)
        return (
            query_BGJQD.flatten(1, 2),
            key_BGTD * key_gate[..., None, :],
            value_BGTD * value_gate[..., None, :],
        )

    def leave(self, out_BHQD: Tensor) -> Tensor:
        """Rotate the attention output back."""
        decode_GDD = self.value_maps.decode_GDD.to(out_BHQD.dtype)
        out_BGJQD = out_BHQD.unflatten(1, (decode_GDD.shape[0], -1))
        restored: Tensor = (out_BGJQD @ decode_GDD.mT[:, None]).flatten(1, 2)
        return restored


class Projected:
    """One layer's keys and values multiplied by square matrices, [GDD] or one a sequence [BGDD].

    With encode diag(gate) decode^T, attention on them equals attention on latents, and queries and
    outputs need no work. None leaves a side as it is.
    """

    key: Tensor | None = None
    value: Tensor | None = None

    def __call__(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        if self.key is not None:
            key_BGTD = key_BGTD @ self.key.to(key_BGTD.dtype)
        if self.value is not None:
            value_BGTD = value_BGTD @ self.value.to(value_BGTD.dtype)
        return key_BGTD, value_BGTD


def rank_gate(ranks: LayerRanks, dim: int) -> Tensor:
    """Gates that keep the first `ranks[head]` columns of every head.  [GD]"""
    return (torch.arange(dim) < torch.tensor(ranks)[:, None]).float()
