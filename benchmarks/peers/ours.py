"""matkv itself, with stored or uniform ranks, an exact recent, an exact prefill; quantized latents.

`exact prefill` reads the context with the full cache and compresses it afterwards, as the other
methods here do; matkv as it ships attends to latents from the first token on. Which tokens are kept
exact is said by `Exact` alone: what an artifact stores for its use counts only where it is named.

Quantized latents are simulated: each latent goes to integer codes and back before attention, by
token, head and side, in groups of neighbouring columns with a scale and a zero point of 16 bits
each. `rotated` turns the kept columns by a random orthogonal matrix first, which spreads the large
leading columns evenly and costs nothing, as it can be merged into the bases. Exact tokens have no
codes: they are read at full width and pay for it in the model's dtype, until they leave the recent.

Shapes: B batch, G KV head, T token, D head dim, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matkv.artifact.artifact import Artifact
from matkv.bases.gates import Projected
from matkv.bases.maps import Maps
from matkv.cache.cache import LatentCache, full_states, refill
from matkv.hf.attach import attach, detach
from matkv.hf.handlers import truncating
from matkv.hf.merge import merged
from matkv.latents.layer import projections_nbytes
from matkv.ranks import SIDES, LayerRanks, RankTable

from .protocol import Method

GROUP = 32  # latent columns that share a scale and a zero point
SCALE_NBYTES = 4  # a scale and a zero point of 16 bits each


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The tokens a cache holds at full width: the first `sink` and the last `recent`."""

    sink: int = 0
    recent: int = 0

    def __str__(self) -> str:
        """As a part of a row's setting, empty where there are none."""
        parts = [(self.sink, "first"), (self.recent, "last")]
        told = " and ".join(f"{name} {count}" for count, name in parts if count)
        return f", {told} exact" if told else ""

    def among(self, tokens: int) -> int:
        """How many of so many tokens are exact."""
        return min(tokens, self.sink + self.recent)


NONE = Exact()


class Latent(Method):
    """An artifact at given ranks."""

    packages = ("matkv",)

    def __init__(
        self,
        artifact: Artifact,
        table: RankTable,
        *,
        exact: Exact = NONE,
        exact_prefill: bool = False,
    ) -> None:
        self.artifact, self.table, self.exact = artifact, table, exact
        self.exact_prefill = exact_prefill

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        try:
            yield self._attach(model)
        finally:
            detach(model)

    def _attach(self, model: Any) -> Any:
        sink, recent = self.exact.sink, self.exact.recent
        return attach(model, self.artifact, ranks=self.table, sink=sink, recent=recent)

    def new_cache(self, model: Any) -> Any:
        return LatentCache(model)

    def read(self, model: Any, context_BT: Tensor) -> Any:
        if not self.exact_prefill:
            return super().read(model, context_BT)
        with merged(detach(model), self.artifact.lora):
            states = full_states(model, context_BT[0])
        return refill(self._attach(model), states)

    def held(self, cache: Any) -> tuple[float, float | None]:
        return cache.used_nbytes, cache.nbytes

    def fixed_nbytes(self, model: Any) -> int:
        return projections_nbytes(self.table, model.dtype)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """How latents are quantized: `bits` a code, `group` columns a scale."""

    bits: int
    group: int = GROUP
    rotated: bool = False

    def nbytes(self, rank: int) -> int:
        """Bytes of one latent of `rank` columns: codes, scales and zero points."""
        if rank == 0:
            return 0
        return -(-rank * self.bits // 8) + -(-rank // self.group) * SCALE_NBYTES


def fake_quantize(z_BTR: Tensor, codes: Codes) -> Tensor:
    """Latents to integer codes and back, each group of columns from its least to its largest.

    z' = scale · round((z - least) / scale) + least, scale = (largest - least) / (2^bits - 1), both
    rounded to the 16 bits they are stored in; without that, off by half a scale at most.
    """
    top = 2**codes.bits - 1
    parts = []
    for part_BTR in z_BTR.float().split(codes.group, dim=-1):
        least, largest = part_BTR.aminmax(dim=-1, keepdim=True)
        scale = ((largest - least) / top).half().float().clamp_min(1e-7)
        zero = least.half().float()
        code = ((part_BTR - zero) / scale).round().clamp(0, top)
        parts.append(code * scale + zero)
    return torch.cat(parts, dim=-1)


def turned(maps: Maps, ranks: LayerRanks) -> list[tuple[Tensor, Tensor]]:
    """Encoding and decoding maps of every head at its rank, [DR], turned by one random rotation."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for encode_DD, decode_DD, rank in zip(maps.encode_XDD, maps.decode_XDD, ranks, strict=True):
        if rank == 0:
            pairs.append((encode_DD[:, :0], decode_DD[:, :0]))
            continue
        turn_RR = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        pairs.append((encode_DD[:, :rank] @ turn_RR, decode_DD[:, :rank] @ turn_RR))
    return pairs


class QuantizedLatents(Projected):
    """One layer's keys and values through quantized latents and back to full width, the sink's not.

    The recent is up to the attention function, which sees both these states and those before.
    """

    def __init__(
        self,
        maps: tuple[Maps, Maps],
        ranks: list[LayerRanks],
        codes: Codes,
        exact: Exact = NONE,
    ) -> None:
        super().__init__(exact.recent)
        self.codes, self.sink = codes, exact.sink
        self.sides = [
            turned(one, its_ranks)
            if codes.rotated
            else [
                (encode_DD[:, :rank], decode_DD[:, :rank])
                for encode_DD, decode_DD, rank in zip(
                    one.encode_XDD, one.decode_XDD, its_ranks, strict=True
                )
            ]
            for one, its_ranks in zip(maps, ranks, strict=True)
        ]

    def __call__(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        key_pairs, value_pairs = self.sides
        return self._through(key_BGTD, key_pairs), self._through(value_BGTD, value_pairs)

    def _through(self, x_BGTD: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        heads = []
        sink_BGTD, x_BGTD = x_BGTD[:, :, : self.sink], x_BGTD[:, :, self.sink :]
        for x_BTD, (encode_DR, decode_DR) in zip(x_BGTD.unbind(1), pairs, strict=True):
            if encode_DR.shape[1] == 0:
                heads.append(torch.zeros_like(x_BTD))
                continue
            z_BTR = x_BTD @ encode_DR.to(x_BTD)
            decoded = fake_quantize(z_BTR, self.codes) @ decode_DR.to(x_BTD.device).T
            heads.append(decoded.to(x_BTD.dtype))
        return torch.cat((sink_BGTD, torch.stack(heads, dim=1)), dim=2)


class LatentCodes(Method):
    """An artifact at given ranks whose latents are quantized, simulated on the full cache."""

    packages = ("matkv",)
    note = "simulated"

    def __init__(
        self, artifact: Artifact, table: RankTable, codes: Codes, exact: Exact = NONE
    ) -> None:
        self.artifact, self.table, self.codes, self.exact = artifact, table, codes, exact

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        handlers = {
            layer: QuantizedLatents(
                (self.artifact.maps(layer, "key"), self.artifact.maps(layer, "value")),
                [self.table.side(side)[layer] for side in SIDES],
                self.codes,
                self.exact,
            )
            for layer in self.artifact.geometry.compressed
        }
        with merged(model, self.artifact.lora), truncating(model, handlers):
            yield model

    def held(self, cache: Any) -> tuple[float, float | None]:
        tokens, dtype = cache.get_seq_length(), cache.layers[0].keys.dtype
        exact = self.exact.among(tokens)
        full = RankTable.full(self.artifact.geometry).bytes_per_token(dtype)
        a_token = sum(self.codes.nbytes(rank) for *_, rank in self.table.compressed_ranks())
        return (tokens - exact) * a_token + exact * full, None

    def fixed_nbytes(self, model: Any) -> int:
        """What matkv's own projections hold at these ranks, in the model's dtype."""
        return projections_nbytes(self.table, model.dtype)
