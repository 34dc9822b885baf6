"""JSON lines in, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from matkv.embeddings.data import read_examples, read_retrieval, read_scored
from matkv.errors import DataError


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_pairs_and_triplets_become_columns(tmp_path: Path) -> None:
    pair = {"anchor": "a", "positive": "b", "source": "x"}
    assert read_examples(write(tmp_path / "p", pair, "", pair), "ranking") == {
        "anchor": ["a", "a"],
        "positive": ["b", "b"],
    }
    triplet = pair | {"negative": "c"}
    columns = read_examples(write(tmp_path / "t", triplet), "ranking")
    assert list(columns) == ["anchor", "positive", "negative"]
    scored = [{"sentence1": "a", "sentence2": "b", "score": s} for s in (1, 2.5)]
    assert read_examples(write(tmp_path / "s", *scored), "cosent")["score"] == [1.0, 2.5]


def test_a_document_is_its_title_and_its_text(tmp_path: Path) -> None:
    corpus = write(
        tmp_path / "c",
        {"_id": "1", "title": "Cats", "text": "They sleep."},
        {"_id": 2, "title": "", "text": "Rain."},
    )
    queries = write(tmp_path / "q", {"_id": "q", "text": "pets", "relevant": ["1", 2]})
    read = read_retrieval(corpus, queries)
    assert read.corpus == {"1": "Cats. They sleep.", "2": "Rain."}
    assert read.queries == {"q": "pets"}
    assert read.relevant == {"q": {"1", "2"}}


GOOD = {"anchor": "a", "positive": "b"}
BAD_EXAMPLES: dict[str, tuple[list[Any], str]] = {
    "not json": ([GOOD, "{'anchor'"], "line 2: not JSON"),
    "no object": ([GOOD, [1]], "line 2: not a JSON object"),
    "no positive": ([GOOD, {"anchor": "a"}], "line 2: 'positive' must be a text that is not empty"),
    "a number": ([{"anchor": 3, "positive": "b"}], "line 1: 'anchor' must be a text"),
    "blank": ([GOOD | {"anchor": "  "}], "line 1: 'anchor' must be a text that is not empty"),
    "some negatives": ([GOOD, GOOD | {"negative": "c"}], "line 2: either all lines have a 'neg"),
    "fewer negatives": ([GOOD | {"negative": "c"}, GOOD], "line 2: either all lines have a 'neg"),
    "nothing": ([], "has no lines"),
}


@pytest.mark.parametrize("case", BAD_EXAMPLES)
def test_bad_examples_are_refused_by_line(case: str, tmp_path: Path) -> None:
    rows, message = BAD_EXAMPLES[case]
    with pytest.raises(DataError, match=message):
        read_examples(write(tmp_path / "file.jsonl", *rows), "ranking")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        read_examples(tmp_path / "none.jsonl", "ranking")


@pytest.mark.parametrize("score", ["3", None, True, float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(score: Any, tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": s} for s in (1.0, score)]
    with pytest.raises(DataError, match="line 2: 'score' must be a finite number"):
        read_scored(write(tmp_path / "file", *rows))


def test_scores_without_an_order_are_refused(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": 1}] * 3
    with pytest.raises(DataError, match="all scores are the same"):
        read_scored(write(tmp_path / "file", *rows))


BAD_RETRIEVAL: dict[str, tuple[list[Any], list[Any], str]] = {
    "no id": ([{"text": "a"}], [], "line 1: '_id' must be"),
    "an id twice": (
        [{"_id": 1, "text": "a"}, {"_id": "1", "text": "b"}],
        [],
        "2: '_id' '1' is there",
    ),
    "no text": ([{"_id": 1}], [], "line 1: 'text' must be"),
    "a title that is none": ([{"_id": 1, "title": 3, "text": "a"}], [], "'title' must be a text"),
    "no answers": (
        [{"_id": 1, "text": "a"}],
        [{"_id": 1, "text": "q"}],
        "'relevant' must be a list",
    ),
    "an empty list": (
        [{"_id": 1, "text": "a"}],
        [{"_id": 1, "text": "q", "relevant": []}],
        "'relevant' must be a list of ids, at least one",
    ),
    "an unknown document": (
        [{"_id": 1, "text": "a"}],
        [{"_id": 1, "text": "q", "relevant": [1]}, {"_id": 2, "text": "q", "relevant": [7]}],
        "line 2: document '7' is not in the corpus",
    ),
}


@pytest.mark.parametrize("case", BAD_RETRIEVAL)
def test_bad_corpora_and_queries_are_refused_by_line(case: str, tmp_path: Path) -> None:
    corpus, queries, message = BAD_RETRIEVAL[case]
    with pytest.raises(DataError, match=message):
        read_retrieval(write(tmp_path / "c", *corpus), write(tmp_path / "q", *queries))
