"""docs/embeddings.md: its code runs and its commands can be typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)

from pages import ROOT, blocks, commands, parse
from tiny_embedders import TEXTS, build

PAGE = ROOT / "docs" / "embeddings.md"


def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    build("bert").save_pretrained("model")
    names: dict[str, Any] = {
        "__name__": "page",
        "path": "model",
        "texts": TEXTS,
        "args": SentenceTransformerTrainingArguments(
            "out", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
        ),
        "dataset": Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
        "evaluator": EmbeddingSimilarityEvaluator(TEXTS, TEXTS[::-1], [1, 2, 3, 4, 5]),
    }
    (code,) = blocks(PAGE, "python")
    exec(compile(code, str(PAGE), "exec"), names)
    assert "spearman_cosine, * trained" in capsys.readouterr().out
    assert (tmp_path / "small" / "modules.json").is_file()
    assert names["shortlist"][1, 8].shape == (len(TEXTS), 8)


def test_commands_can_be_typed_as_they_stand() -> None:
    found = [words for block in blocks(PAGE, "sh") for words in commands(block)]
    assert len(found) > 4
    for words in found:
        parse(words)
