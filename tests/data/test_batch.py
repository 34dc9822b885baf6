"""What a model is fed: padding, positions, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matkv.data.batch import IGNORED, Batch
from matkv.errors import DataError
from tiny import Tiny, left_padded, tokens

SHORT, LONG = torch.tensor([5, 6]), torch.tensor([1, 2, 3, 4])


def test_shorter_sequences_are_padded_on_the_right() -> None:
    batch = Batch.padded([LONG, SHORT], [LONG, SHORT])
    assert batch.ids_BT.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert batch.mask_BT is not None and batch.mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels_BT is not None and batch.labels_BT[1].tolist() == [5, 6, IGNORED, IGNORED]
    assert batch.tokens == 6


def test_equal_lengths_need_no_mask() -> None:
    batch = Batch.padded([LONG, LONG + 4])
    assert batch.mask_BT is None and batch.labels_BT is None
    assert batch.real.tolist() == [[1] * 4] * 2 and batch.tokens == 8
    assert set(batch.inputs()) == {"input_ids"}


def test_a_mask_of_ones_is_none() -> None:
    ids_BT = tokens(2, 5)
    given = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    assert Batch.of(given).mask_BT is None
    assert torch.equal(Batch.of(given).ids_BT, Batch.of(ids_BT).ids_BT)


def test_positions_count_tokens_whatever_side_is_padded() -> None:
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    batch = Batch.of({"input_ids": tokens(2, 4), "attention_mask": left})
    assert batch.inputs()["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    inputs = batch.inputs(copies=2)
    assert all(torch.equal(x[:2], x[2:]) and len(x) == 4 for x in inputs.values())


def test_a_batch_is_its_own() -> None:
    batch = Batch.padded([LONG, SHORT], [LONG, SHORT])
    assert Batch.of(batch) is batch
    moved = batch.to(torch.device("meta"))
    tensors = (moved.ids_BT, moved.mask_BT, moved.labels_BT)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)


@torch.no_grad()
def test_padding_changes_no_logits(family: Tiny) -> None:
    prompts = [tokens(1, 9, seed=1), tokens(1, 6, seed=2)]
    ids_BT, mask_BT = left_padded(prompts)
    left = Batch.of({"input_ids": ids_BT, "attention_mask": mask_BT})
    right = Batch.padded([ids_BT[0] for ids_BT in prompts])
    for batch in (left, right):
        logits = family.model(**batch.inputs(), use_cache=False).logits
        for row, ids_1T in enumerate(prompts):
            alone = family.model(ids_1T, use_cache=False).logits[0]
            found = logits[row][batch.real[row].bool()]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("some text", "a batch is 'some text': give token ids"),
        ({"text": "some text"}, r"a batch is \{'text': 'some text'\}: give token ids"),
        (tokens(1, 5)[0], r"a batch is a tensor \[5\] of int64"),
        (torch.rand(2, 5), r"a batch is a tensor \[2, 5\] of float32"),
        (
            {"input_ids": tokens(2, 5), "attention_mask": torch.ones(1, 5)},
            r"the attention mask is a tensor \[1, 5\] of float32, .* of the same shape",
        ),
    ],
)
def test_what_is_no_batch_is_refused(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Batch.of(given)
