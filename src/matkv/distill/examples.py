"""What a training step sees: sequences in a seeded order, each with the sizes drawn for it.

Everything about an example follows from the seed and its position, so that a resumed run, or one
spread over more processes, sees exactly the same.

Shapes: B sequence, T token, N example, K draws a sequence, X axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

from matkv.data.batch import IGNORED, Batch
from matkv.errors import DataError
from matkv.schedule import Schedule

# Windows of text [NT], or sequences of any length as {"input_ids": [T], "labels": [T]}.
Examples = Tensor | Sequence[Mapping[str, Tensor]]
PRIME = 2_147_483_647


class TrainingSet(Dataset[dict[str, Tensor]]):
    """`steps` batches of `batch_size` sequences; every epoch in an order of its own.

    `draw` is "sequence" for sizes drawn anew for every sequence, or "step" for the same sizes in
    all sequences of a step.

    Raises:
        DataError: there is no example.
    """

    def __init__(
        self,
        examples: Examples,
        schedule: Schedule,
        *,
        batch_size: int,
        steps: int,
        draw: str,
        seed: int,
    ) -> None:
        if len(examples) == 0:
            raise DataError("there is no example to train on: give more text")
        self.examples, self.schedule, self.seed = examples, schedule, seed
        self.batch_size, self.steps, self.draw = batch_size, steps, draw
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return self.batch_size * self.steps

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {**self.example(position), "sizes": self.sizes(position)}

    def example(self, position: int) -> dict[str, Tensor]:
        """The sequence at a position of the run."""
        epoch, place = divmod(position, len(self.examples))
        return as_example(self.examples[self._order(epoch)[place]])

    def tokens(self, step: int) -> int:
        """How many tokens a step trains on."""
        first = step * self.batch_size
        if isinstance(self.examples, Tensor):
            return self.batch_size * self.examples.shape[1]
        rows = [self.example(first + index)["input_ids"] for index in range(self.batch_size)]
        return sum(len(row) for row in rows)

    def sizes(self, position: int) -> Tensor:
        """The sizes drawn for a position of the run.  [KX]"""
        drawn = position // self.batch_size if self.draw == "step" else position
        return torch.tensor(self.schedule.draw(drawn, self._generator(2 * drawn + 1)))

    def _make_order(self, epoch: int) -> list[int]:
        order_N = torch.randperm(len(self.examples), generator=self._generator(2 * epoch))
        order: list[int] = order_N.tolist()
        return order

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * PRIME + stream)


def longest_of(examples: Examples) -> int:
    """Tokens of the longest sequence; 0 where there is none."""
    if isinstance(examples, Tensor):
        return examples.shape[1] if len(examples) else 0
    return max((len(example["input_ids"]) for example in examples), default=0)


def as_example(example: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Token ids and labels of one sequence; the first token is nobody's next token."""
    if isinstance(example, Tensor):
        example = {"input_ids": example, "labels": example}
    labels_T = example["labels"].clone()
    labels_T[:1] = IGNORED
    return {"input_ids": example["input_ids"], "labels": labels_T}


def as_batch(items: Sequence[Mapping[str, Tensor]]) -> Batch:
    """Examples side by side."""
    return Batch.padded([item["input_ids"] for item in items], [item["labels"] for item in items])


def collate(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What the Trainer hands to the student: a batch, and the sizes drawn for it [BKX]."""
    batch = as_batch(items)
    fields = {
        "input_ids": batch.ids_BT,
        "labels": batch.labels_BT,
        "attention_mask": batch.mask_BT,
        "sizes": torch.stack([item["sizes"] for item in items]),
    }
    return {name: tensor for name, tensor in fields.items() if tensor is not None}
