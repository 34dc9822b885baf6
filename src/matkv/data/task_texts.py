"""Tasks as text to search on: every training item with its right answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from matkv.data.batch import Batch
from matkv.data.task_items import load_tasks
from matkv.errors import DataError


def training_texts(names: Sequence[str], folder: Path | None = None) -> list[str]:
    """Question and right answer of every training item of the tasks.

    All items of `folder`/NAME.jsonl, which must not be those that are scored later; without a
    folder the training split that lm-eval knows of a task.

    Raises:
        DataError: a task or its data is missing, or it has no training split.
        MatkvError: lm-eval is not installed.
    """
    texts = []
    for loaded in load_tasks(names, folder):
        task = loaded.task
        if folder is None and not task.has_training_docs():
            raise DataError(
                f"{loaded.name} has no training split: search on --text, or on items of your own "
                "with --tasks-dir"
            )
        docs = task.eval_docs if folder is not None else task.training_docs()
        texts += [_solved(task, doc) for doc in docs]
    return texts


def _solved(task: Any, doc: Any) -> str:
    """An item's question with its right answer behind it."""
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    delimiter = task.config.target_delimiter
    if isinstance(text, int):  # the same target after each of several contexts
        return f"{task.doc_to_choice(doc)[text]}{delimiter}{target}"
    if isinstance(target, int):
        target = task.doc_to_choice(doc)[target]
    return f"{text}{delimiter}{target}"


def text_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int, *, seed: int = 0
) -> Iterator[Batch]:
    """The texts in a random order again and again, padded.

    Raises:
        DataError: there is no text.
    """
    rows = [torch.tensor(ids) for text in texts if (ids := tokenizer(text).input_ids)]
    if not rows:
        raise DataError("there is no text to search on: give tasks with training items")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    endless = cycle(rows[index] for index in order)
    while True:
        yield Batch.padded(list(islice(endless, batch_size)))
