"""What a training step sees: the order of examples, and their sizes."""

from __future__ import annotations

import torch

from lessons import text
from matkv.data.batch import IGNORED
from matkv.distill.bases import rank_axes
from matkv.distill.examples import TrainingSet, as_example, collate, longest_of
from matkv.schedule import Independent
from tiny import Tiny


def test_every_epoch_meets_every_example_once_in_a_new_order(llama: Tiny) -> None:
    axes = rank_axes(llama.artifact.geometry)
    data = TrainingSet(text(10), Independent(axes), batch_size=5, steps=4, draw="step", seed=0)
    order = [tuple(data[position]["input_ids"].tolist()) for position in range(20)]
    assert sorted(order[:10]) == sorted(order[10:]) == sorted(map(tuple, text(10).tolist()))
    assert order[:10] != order[10:]
    sizes = [tuple(data[position]["sizes"].flatten().tolist()) for position in range(20)]
    assert len(set(sizes)) == 4
    assert sizes[0] == sizes[4] != sizes[5]


def test_sizes_are_drawn_for_every_sequence_unless_for_a_step(llama: Tiny) -> None:
    axes = rank_axes(llama.artifact.geometry)
    data = TrainingSet(text(10), Independent(axes), batch_size=5, steps=2, draw="sequence", seed=0)
    sizes = [tuple(data[position]["sizes"].flatten().tolist()) for position in range(10)]
    assert len(set(sizes)) == 10


def test_the_first_token_and_ignored_ones_are_nobodys_next(llama: Tiny) -> None:
    ids_T = text()[0]
    example = as_example({"input_ids": ids_T, "labels": ids_T.masked_fill(ids_T > 50, IGNORED)})
    assert example["labels"][0] == IGNORED
    assert torch.equal(example["labels"][1:] == IGNORED, ids_T[1:] > 50)
    assert torch.equal(as_example(ids_T)["labels"][1:], ids_T[1:])


def test_examples_of_several_lengths_share_a_batch() -> None:
    rows = [text()[0], text()[1][:5]]
    items = [{**as_example(ids_T), "sizes": torch.ones(1, 3).long()} for ids_T in rows]
    batch = collate(items)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["sizes"].shape == (2, 1, 3)
    assert batch["attention_mask"].sum(-1).tolist() == [16, 5]
    assert set(batch["labels"][1, 5:].tolist()) == {IGNORED}
    assert "attention_mask" not in collate(items[:1])


def test_tokens_of_a_step_are_those_of_its_sequences() -> None:
    lengths = [3, 9, 4, 5]
    examples = [as_example(text()[0][:length]) for length in lengths]
    data = TrainingSet(examples, Independent(()), batch_size=4, steps=2, draw="step", seed=0)
    assert [data.tokens(step) for step in range(2)] == [21, 21]
    assert longest_of(examples) == 9 and longest_of(text()) == 16 and longest_of([]) == 0
    whole = TrainingSet(text(), Independent(()), batch_size=4, steps=2, draw="step", seed=0)
    assert whole.tokens(0) == 64
