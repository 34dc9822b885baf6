"""matkv itself, with stored or uniform ranks, an exact window, an exact prefill; quantized latents.

`exact prefill` reads the context with the full cache and compresses it afterwards, as the other
methods here do; matkv as it ships attends to latents from the first token on.

Quantized latents are simulated: each latent goes to integer codes and back before attention, by
token, head and side, in groups of neighbouring columns with a scale and a zero point of 16 bits
each. `rotated` turns the kept columns by a random orthogonal matrix first, which spreads the large
leading columns evenly and costs nothing, as it can be merged into the bases.

Shapes: B batch, G KV head, T token, D head dim, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matkv import Artifact, LatentCache, attach, detach
from matkv.cache import attached_projections, refill
from matkv.errors import MatkvError
from matkv.evaluate import full_states
from matkv.hf import handled
from matkv.latents import LayerProjection, Projected
from matkv.projection import Maps
from matkv.ranks import SIDES, LayerRanks, RankTable

from .protocol import Method

GROUP = 32  # latent columns that share a scale and a zero point
SCALE_NBYTES = 4  # a scale and a zero point of 16 bits each


class Latent(Method):
    """An artifact at given ranks."""

    packages = ("matkv",)

    def __init__(
        self,
        artifact: Artifact,
        table: RankTable,
        *,
        window: int | None = None,
        exact_prefill: bool = False,
    ) -> None:
        self.artifact, self.table, self.window = artifact, table, window
        self.exact_prefill = exact_prefill

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        try:
            yield self._attach(model)
        finally:
            detach(model)

    def _attach(self, model: Any) -> Any:
        return attach(model, self.artifact, ranks=self.table, window=self.window)

    def new_cache(self, model: Any) -> Any:
        return LatentCache(model)

    def read(self, model: Any, context_BT: Tensor) -> Any:
        if not self.exact_prefill:
            return super().read(model, context_BT)
        states = full_states(detach(model), context_BT[0])
        return refill(self._attach(model), states)

    def held(self, cache: Any) -> tuple[float, float | None]:
        return cache.used_nbytes, cache.nbytes

    def fixed_nbytes(self, model: Any) -> int:
        return sum(map(buffer_nbytes, attached_projections(model).values()))


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
    for encode_DD, decode_DD, rank in zip(maps.encode_GDD, maps.decode_GDD, ranks, strict=True):
        if rank == 0:
            pairs.append((encode_DD[:, :0], decode_DD[:, :0]))
            continue
        turn_RR = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        pairs.append((encode_DD[:, :rank] @ turn_RR, decode_DD[:, :rank] @ turn_RR))
    return pairs


class QuantizedLatents(Projected):
    """One layer's keys and values through quantized latents and back to full width."""

    def __init__(self, maps: tuple[Maps, Maps], ranks: list[LayerRanks], codes: Codes) -> None:
        self.codes = codes
        self.sides = [
            turned(one, its_ranks)
            if codes.rotated
            else [
                (encode_DD[:, :rank], decode_DD[:, :rank])
                for encode_DD, decode_DD, rank in zip(
                    one.encode_GDD, one.decode_GDD, its_ranks, strict=True
                )
            ]
            for one, its_ranks in zip(maps, ranks, strict=True)
        ]

    def __call__(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        key_pairs, value_pairs = self.sides
        return self._through(key_BGTD, key_pairs), self._through(value_BGTD, value_pairs)

    def _through(self, x_BGTD: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        heads = []
        for x_BTD, (encode_DR, decode_DR) in zip(x_BGTD.unbind(1), pairs, strict=True):
            if encode_DR.shape[1] == 0:
                heads.append(torch.zeros_like(x_BTD))
                continue
            z_BTR = x_BTD @ encode_DR.to(x_BTD)
            decoded = fake_quantize(z_BTR, self.codes) @ decode_DR.to(x_BTD.device).T
            heads.append(decoded.to(x_BTD.dtype))
        return torch.stack(heads, dim=1)


class LatentCodes(Method):
    """An artifact at given ranks whose latents are quantized, simulated on the full cache.

    Raises:
        MatkvError: the artifact keeps exact tokens or has adapters, which are not simulated.
    """

    packages = ("matkv",)
    note = "simulated"

    def __init__(self, artifact: Artifact, table: RankTable, codes: Codes) -> None:
        if artifact.sink or artifact.window or artifact.lora is not None:
            raise MatkvError("quantized latents are simulated without exact tokens and adapters")
        self.artifact, self.table, self.codes = artifact, table, codes

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        handlers = {
            layer: QuantizedLatents(
                (self.artifact.maps(layer, "key"), self.artifact.maps(layer, "value")),
                [self.table.side(side)[layer] for side in SIDES],
                self.codes,
            )
            for layer in self.artifact.geometry.growing
        }
        with handled(model, handlers):
            yield model

    def held(self, cache: Any) -> tuple[float, float | None]:
        a_token = sum(self.codes.nbytes(rank) for *_, rank in self.table.growing_ranks())
        return cache.get_seq_length() * a_token, None

    def fixed_nbytes(self, model: Any) -> int:
        """What matkv's own projections hold at these ranks, in the model's dtype."""
        total = 0
        for layer in self.artifact.geometry.growing:
            key, value = (self.artifact.maps(layer, side) for side in SIDES)
            key_ranks, value_ranks = (self.table.side(side)[layer] for side in SIDES)
            projection = LayerProjection(key, value, key_ranks, value_ranks)
            total += buffer_nbytes(projection.to(model.dtype))
        return total


def buffer_nbytes(projection: LayerProjection) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in projection.buffers())
