"""All bases as one module: their order, their products, and what is exported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from matkv.artifact.artifact import Artifact
from matkv.bases.gates import gated, rank_gate
from matkv.bases.maps import SideBases
from matkv.distill.bases import Bases, rank_axes, sizes_of
from matkv.ranks import SIDES, Geometry, LayerShape
from tiny import Tiny, ragged_table, random_maps

DIMS = {0: 8, 2: 12, 3: 8}  # of the growing layers; layer 1 has a sliding window
MIXED = Geometry(
    query_heads=4,
    layers=tuple(
        LayerShape(
            kv_heads=2 + layer, head_dim=DIMS.get(layer, 8), window=4 if layer == 1 else None
        )
        for layer in range(4)
    ),
)


@pytest.fixture
def mixed() -> Artifact:
    """Random bases of two head dims; those of layer 2 are not orthogonal."""
    bases = {}
    for layer, dim in DIMS.items():
        heads = MIXED.layers[layer].kv_heads
        bases[layer] = {
            side: SideBases(
                random_maps(heads, dim, seed=2 * layer + place, oblique=layer == 2),
                torch.full((heads, dim), 1 / dim),
            )
            for place, side in enumerate(SIDES)
        }
    return Artifact(base_model="none", geometry=MIXED, fingerprint=(), bases=bases)


def test_axes_and_sizes_have_one_order(mixed: Artifact) -> None:
    table = ragged_table(MIXED, 1)
    axes = rank_axes(MIXED, 3)
    assert len(axes) == 2 * (2 + 4 + 5)
    assert [axis.name for axis in axes[:5]] == [
        "0.key.0",
        "0.key.1",
        "0.value.0",
        "0.value.1",
        "2.key.0",
    ]
    by_name = dict(zip((axis.name for axis in axes), sizes_of(table), strict=True))
    for layer, side, head, rank in table.compressed_ranks():
        assert by_name[f"{layer}.{side}.{head}"] == rank
    assert {axis.size for axis in axes} == {8, 12} and {axis.grain for axis in axes} == {3}


def test_every_layer_gets_the_product_of_its_own_bases_and_ranks(mixed: Artifact) -> None:
    tables = [ragged_table(MIXED, seed) for seed in (1, 2)]
    products = Bases(mixed, "free")(torch.tensor([sizes_of(table) for table in tables]))
    assert set(products) == {(layer, side) for layer in DIMS for side in SIDES}
    for (layer, side), product_BGDD in products.items():
        maps = mixed.maps(layer, side)
        for table, product_GDD in zip(tables, product_BGDD, strict=True):
            open_GD = rank_gate(torch.tensor(table.side(side)[layer]), DIMS[layer])
            torch.testing.assert_close(product_GDD, gated(maps, open_GD))


def test_what_is_exported_untrained_are_the_bases_of_the_start(mixed: Artifact) -> None:
    made = Bases(mixed, "free").export()
    assert set(made) == set(DIMS)
    for layer, sides in made.items():
        for side, maps in sides.items():
            assert torch.equal(maps.encode_XDD, mixed.maps(layer, side).encode_XDD)
            assert torch.equal(maps.decode_XDD, mixed.maps(layer, side).decode_XDD)


def test_orthogonal_bases_are_exported_as_one_tensor(llama: Tiny) -> None:
    for sides in Bases(llama.artifact, "cayley").export().values():
        assert all(maps.is_orthogonal for maps in sides.values())


def test_the_start_is_named_by_its_bits(llama: Tiny, mixed: Artifact) -> None:
    start = Bases(mixed, "free").start
    assert start == Bases(replace(mixed, sink=3), "free").start
    sides = mixed.bases[3]
    swapped = {"key": sides["value"], "value": sides["key"]}
    other = replace(mixed, bases={**mixed.bases, 3: swapped})  # type: ignore[dict-item]
    assert start != Bases(other, "free").start
