"""A layer's matrices: latents are prefixes, heads in buckets are the heads one by one."""

from __future__ import annotations

import pytest
import torch

from matkv.attention.latent import attend
from matkv.bases.gates import GatedProjection
from matkv.bases.maps import Maps
from matkv.errors import RankError
from matkv.latents.latents import Latents
from matkv.latents.layer import Bucket, LayerProjection, projections_nbytes
from matkv.ranks import SIDES, LayerRanks
from tiny import Tiny, largest_difference, random_maps

HEADS, DIM = 4, 12
KEY, VALUE = random_maps(HEADS, DIM, 1), random_maps(HEADS, DIM, 2, oblique=True)
TABLES: list[tuple[LayerRanks, LayerRanks]] = [
    ((5, 5, 5, 5), (5, 5, 5, 5)),
    ((12, 12, 12, 12), (12, 12, 12, 12)),
    ((1, 7, 1, 12), (3, 5, 3, 11)),
    ((0, 7, 12, 0), (4, 0, 0, 0)),
]


def random_states(tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    key_BGTD, value_BGTD = torch.randn(2, 2, HEADS, tokens, DIM, generator=generator)
    return key_BGTD, value_BGTD


def test_orthogonal_maps_are_one_tensor_and_their_own_inverse() -> None:
    assert KEY.is_orthogonal
    assert not VALUE.is_orthogonal
    for maps in (KEY, VALUE):
        assert largest_difference(maps.encode_XDD @ maps.decode_XDD.mT, torch.eye(DIM)) < 1e-5


@pytest.mark.parametrize(("key_ranks", "value_ranks"), TABLES)
def test_rows_are_the_leading_coordinates_of_every_head(
    key_ranks: LayerRanks, value_ranks: LayerRanks
) -> None:
    projection = LayerProjection(KEY, VALUE, key_ranks, value_ranks)
    key_BGTD, value_BGTD = random_states()
    rows = projection.encode(key_BGTD, value_BGTD)
    order = projection.order.tolist()
    for bucket, rows_BNTC in zip(projection.buckets, rows, strict=True):
        for place, head in enumerate(order[bucket.heads]):
            z_key = key_BGTD[:, head] @ KEY.encode_XDD[head, :, : key_ranks[head]]
            z_value = value_BGTD[:, head] @ VALUE.encode_XDD[head, :, : value_ranks[head]]
            torch.testing.assert_close(rows_BNTC[:, place], torch.cat((z_key, z_value), -1))
    assert sorted(order) == list(range(HEADS))


def test_unsort_undoes_sort() -> None:
    for key_ranks, value_ranks in TABLES:
        projection = LayerProjection(KEY, VALUE, key_ranks, value_ranks)
        key_BGTD, _ = random_states()
        assert torch.equal(projection.unsort(projection.sort(key_BGTD)), key_BGTD)


def test_leave_undoes_enter() -> None:
    projection = LayerProjection(KEY, VALUE, *TABLES[2])
    query_BHQD = torch.randn(2, 3 * HEADS, 5, DIM, generator=torch.Generator().manual_seed(4))
    assert torch.equal(projection.leave(projection.enter(query_BHQD), 5), query_BHQD)


def test_heads_with_rows_of_one_width_share_a_bucket() -> None:
    projection = LayerProjection(KEY, VALUE, (3, 6, 5, 3), (5, 5, 3, 6))
    assert projection.order.tolist() == [0, 2, 3, 1]
    assert projection.buckets == [
        Bucket(slice(0, 2), 8, 5),
        Bucket(slice(2, 3), 9, 6),
        Bucket(slice(3, 4), 11, 6),
    ]


@pytest.mark.parametrize("ranks", [(3, 3, 3), (3, 3, 3, 13), (3, 3, 3, -1)])
def test_ranks_that_do_not_fit_the_maps_are_refused(ranks: LayerRanks) -> None:
    fine = (3, 3, 3, 3)
    with pytest.raises(RankError, match="do not fit 4 KV heads of dimension 12"):
        LayerProjection(KEY, VALUE, ranks, fine)
    with pytest.raises(RankError, match="do not fit"):
        LayerProjection(KEY, VALUE, fine, ranks)


def test_matrices_are_no_part_of_the_state_dict() -> None:
    projection = LayerProjection(KEY, VALUE, *TABLES[2])
    assert not projection.state_dict()
    assert not list(projection.parameters())


def gated(
    key: Maps, value: Maps, key_ranks: LayerRanks, value_ranks: LayerRanks
) -> GatedProjection:
    projection = GatedProjection({"key": key, "value": value})
    projection.open("key", torch.tensor(key_ranks))
    projection.open("value", torch.tensor(value_ranks))
    return projection


@pytest.mark.parametrize(("key_ranks", "value_ranks"), TABLES)
def test_gates_of_a_table_equal_its_projection(
    key_ranks: LayerRanks, value_ranks: LayerRanks
) -> None:
    key_BGTD, value_BGTD = random_states()
    query_BHTD = torch.randn(2, 2 * HEADS, 6, DIM, generator=torch.Generator().manual_seed(4))
    projection = LayerProjection(KEY, VALUE, key_ranks, value_ranks)
    latents = Latents(projection, projection.encode(key_BGTD, value_BGTD))
    expected = attend(latents, query_BHTD, None, scaling=0.3)

    key, value = gated(KEY, VALUE, key_ranks, value_ranks)(key_BGTD, value_BGTD)
    out = torch.nn.functional.scaled_dot_product_attention(
        query_BHTD,
        key.repeat_interleave(2, 1),
        value.repeat_interleave(2, 1),
        is_causal=True,
        scale=0.3,
    )
    assert largest_difference(out, expected) < 1e-5


def test_gates_may_differ_between_sequences() -> None:
    key_BGTD, value_BGTD = random_states()
    handlers = [gated(KEY, VALUE, *TABLES[0]), gated(KEY, VALUE, *TABLES[2])]
    both = GatedProjection({"key": KEY, "value": VALUE})
    for side in SIDES:
        both.gates[side] = torch.stack([handler.gates[side] for handler in handlers])
    together = both(key_BGTD, value_BGTD)
    for row, handler in enumerate(handlers):
        alone = handler(key_BGTD, value_BGTD)
        for joint, single in zip(together, alone, strict=True):
            torch.testing.assert_close(joint[row], single[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_its_bytes_are_those_of_its_buffers(gemma3: Tiny, seed: int, dtype: torch.dtype) -> None:
    table, artifact = gemma3.ragged(seed), gemma3.artifact
    held = 0
    for layer in artifact.geometry.compressed:
        key, value = (artifact.maps(layer, side) for side in SIDES)
        projection = LayerProjection(key, value, table.key[layer], table.value[layer]).to(dtype)
        held += sum(buffer.untyped_storage().nbytes() for buffer in projection.buffers())
    assert projections_nbytes(table, dtype) == held
