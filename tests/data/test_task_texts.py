"""Tasks as text to search on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from matkv.data.task_texts import text_batches, training_texts
from matkv.errors import DataError

pytest.importorskip("lm_eval")


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) for letter in text]})


def write(folder: Path, name: str, items: list[dict[str, Any]]) -> None:
    lines = "\n".join(json.dumps(item) for item in items)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def test_items_come_with_their_right_answers(tmp_path: Path) -> None:
    write(tmp_path, "one", [{"query": "Question: 1 + 1?", "choices": ["3", "2"], "gold": 1}])
    write(
        tmp_path,
        "two",
        [{"context_options": ["Ann", "Bob"], "continuation": "was late.", "gold": 0}],
    )
    assert training_texts(["one", "two"], tmp_path) == [
        "Question: 1 + 1?\nAnswer: 2",
        "Ann was late.",
    ]


def test_batches_repeat_every_text_and_mask_padding() -> None:
    texts = ["a", "bcd", "ef"]
    batches = list(islice(text_batches(Letters(), texts, 2), 3))  # type: ignore[arg-type]
    seen = []
    for batch in batches:
        for ids_T, mask_T in zip(batch.ids_BT, batch.real, strict=True):
            seen.append("".join(map(chr, ids_T[mask_T.bool()].tolist())))
            assert mask_T.tolist() == sorted(mask_T.tolist(), reverse=True)
    assert sorted(seen[:3]) == sorted(texts)
    assert seen[:3] == seen[3:]


def test_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="no text to search on"):
        next(text_batches(Letters(), [], 2))  # type: ignore[arg-type]
