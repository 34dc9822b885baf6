"""An artifact with everything in it, made in memory, and what it is to be equal to another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from matkv.artifact.artifact import Artifact
from matkv.artifact.lora import DOWN, UP, WRAPPER, Lora
from matkv.bases.maps import SideBases
from matkv.ranks import SIDES, Geometry, LayerShape
from tiny import ragged_table, random_maps

GEOMETRY = Geometry(
    query_heads=4,
    layers=(
        LayerShape(kv_heads=2, head_dim=8, window=4),
        LayerShape(kv_heads=2, head_dim=8),
        LayerShape(kv_heads=2, head_dim=8),
    ),
)


def make(seed: int = 0, *, lora: bool = False) -> Artifact:
    """An artifact with everything in it: pairs of maps, tables, exact tokens, history.

    Adapters, where wanted, are of a model that is not there.
    """

    def side(number: int, *, oblique: bool) -> SideBases:
        maps = random_maps(2, 8, 10 * seed + number, oblique=oblique)
        return SideBases(maps, torch.rand(2, 8, generator=torch.Generator().manual_seed(number)))

    return Artifact(
        base_model="somebody/some-model",
        geometry=GEOMETRY,
        fingerprint=(0.25, -1.5, 3e-7),
        bases={
            layer: {"key": side(layer, oblique=False), "value": side(layer + 4, oblique=True)}
            for layer in GEOMETRY.compressed
        },
        tables={1 / 3: ragged_table(GEOMETRY, 1), 0.5: ragged_table(GEOMETRY, 2)},
        sink=4,
        recent=16,
        history=({"stage": "calibrate", "tokens": 1000, "note": "é"},),
        lora=adapters(seed) if lora else None,
    )


def adapters(seed: int = 0) -> Lora:
    """One linear map's."""
    generator = torch.Generator().manual_seed(seed)
    name = "base_model.model.layers.0.q_proj"
    down_RM, up_NR = (torch.randn(*shape, generator=generator) for shape in ((2, 6), (4, 2)))
    tensors = {f"{name}{DOWN}": down_RM, f"{name}{UP}": up_NR}
    return Lora({"peft_type": "LORA", "r": 2, "lora_alpha": 4.0}, tensors)


def adapters_of(model: Any, names: tuple[str, ...], seed: int = 0) -> Lora:
    """Random ones of all linear maps of a model with one of these names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in names:
            N, M = module.weight.shape
            tensors[f"{WRAPPER}{path}{DOWN}"] = 0.3 * torch.randn(2, M, generator=generator)
            tensors[f"{WRAPPER}{path}{UP}"] = 0.3 * torch.randn(N, 2, generator=generator)
    return Lora({"peft_type": "LORA", "r": 2, "lora_alpha": 4.0}, tensors)


def assert_equal(one: Artifact, other: Artifact) -> None:
    assert replace(one, bases={}, lora=None) == replace(other, bases={}, lora=None)
    assert (one.lora is None) == (other.lora is None)
    if one.lora is not None and other.lora is not None:
        assert one.lora.config == other.lora.config
        assert one.lora.tensors.keys() == other.lora.tensors.keys()
        for name, tensor in one.lora.tensors.items():
            assert torch.equal(tensor, other.lora.tensors[name])
    assert one.bases.keys() == other.bases.keys()
    for layer in one.bases:
        for side in SIDES:
            mine, theirs = one.bases[layer][side], other.bases[layer][side]
            assert torch.equal(mine.maps.encode_XDD, theirs.maps.encode_XDD)
            assert torch.equal(mine.maps.decode_XDD, theirs.maps.decode_XDD)
            assert mine.maps.is_orthogonal == theirs.maps.is_orthogonal
            assert torch.equal(mine.energy_GD, theirs.energy_GD)
