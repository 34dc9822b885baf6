"""The heads of one process, where several share a model: their projections, and how wide pages are.

vLLM gives every process heads that follow one another, and the same ones to several where there are
fewer heads than processes; its pages are as wide in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from matkv.artifact.artifact import Artifact
from matkv.latents.coding import layer_coding
from matkv.latents.layer import LayerProjection
from matkv.ranks import SIDES, RankTable


@dataclass(frozen=True)
class Shard:
    """One of some processes that share every layer."""

    process: int = 0
    processes: int = 1

    def heads(self, count: int) -> list[int]:
        """Its heads of so many."""
        if count >= self.processes:
            size = count // self.processes
            return list(range(self.process * size, (self.process + 1) * size))
        return [self.process * count // self.processes]


def projection_of(
    artifact: Artifact, table: RankTable, layer: int, shard: Shard
) -> LayerProjection:
    """The projection of a shard's heads, in fp32."""
    heads = shard.heads(table.geometry.layers[layer].kv_heads)
    key, value = (artifact.maps(layer, side) for side in SIDES)
    coding = layer_coding(table, layer, artifact.quantizer)
    return LayerProjection(
        key.changed(lambda maps_GDD: maps_GDD[heads]),
        value.changed(lambda maps_GDD: maps_GDD[heads]),
        tuple(table.key[layer][head] for head in heads),
        tuple(table.value[layer][head] for head in heads),
        source=artifact.digest,
        coding=None if coding is None else (coding[0].picked(heads), coding[1].picked(heads)),
    )


def widest_row(table: RankTable, layer: int, processes: int, dtype: torch.dtype) -> int:
    """Bytes of one token in the process whose heads take most; never none."""
    heads = table.geometry.layers[layer].kv_heads
    shards = [Shard(process, processes) for process in range(processes)]
    return max(1, *(table.heads_bytes(layer, one.heads(heads), dtype) for one in shards))
