"""What the commands read: JSON lines of texts to train on and to measure with.

    anchor, positive[, negative]          pairs or triplets, for the ranking loss
    sentence1, sentence2, score           pairs with a similarity, for the cosent loss and --pairs
    _id, [title,] text                    a document of a corpus
    _id, text, relevant                   a query, and the ids of the documents that answer it

Other fields are ignored. Every error names the file and the line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matkv.errors import DataError
from matkv.files import read_json_lines

LossName = Literal["ranking", "cosent"]
RANKING = ("anchor", "positive", "negative")
SCORED = ("sentence1", "sentence2", "score")


@dataclass(frozen=True)
class Scored:
    """Pairs of sentences and how similar they are."""

    first: list[str]
    second: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Retrieval:
    """Documents and queries by id, and the documents that answer each query."""

    corpus: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, set[str]]


def read_examples(path: Path, loss: LossName) -> dict[str, list[Any]]:
    """Columns to train `loss` on: texts, and scores for cosent.

    Raises:
        DataError: the file is missing or empty, or a line lacks a field or has a wrong one.
    """
    if loss == "cosent":
        pairs = read_scored(path)
        return dict(zip(SCORED, (pairs.first, pairs.second, pairs.scores), strict=True))
    rows = list(_records(path))
    names = RANKING if "negative" in rows[0][1] else RANKING[:2]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for where, row in rows:
        if ("negative" in row) != ("negative" in names):
            raise DataError(f"{where}: either all lines have a 'negative' or none")
        for name in names:
            columns[name].append(_text(where, row, name))
    return columns


def read_scored(path: Path) -> Scored:
    """Pairs of sentences with a score.

    Raises:
        DataError: the file is missing or empty, or a line lacks a field or has a wrong one.
    """
    pairs = Scored([], [], [])
    for where, row in _records(path):
        pairs.first.append(_text(where, row, "sentence1"))
        pairs.second.append(_text(where, row, "sentence2"))
        pairs.scores.append(_score(where, row))
    if len(set(pairs.scores)) < 2:
        raise DataError(f"{path}: all scores are the same, so no order can be learned or measured")
    return pairs


def read_retrieval(corpus: Path, queries: Path) -> Retrieval:
    """A corpus, and queries with the documents that answer them.

    A document is its title, a full stop and its text.

    Raises:
        DataError: a file is missing or empty, a line lacks a field or has a wrong one, an id is
            there twice, or a query names a document that is not in the corpus.
    """
    read = Retrieval({}, {}, {})
    for where, row in _records(corpus):
        parts = [_text(where, row, "title")] if row.get("title") else []
        read.corpus[_id(where, row, read.corpus)] = ". ".join([*parts, _text(where, row, "text")])
    for where, row in _records(queries):
        query = _id(where, row, read.queries)
        read.queries[query] = _text(where, row, "text")
        read.relevant[query] = set(_relevant(where, row, read.corpus))
    return read


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    empty = True
    for where, row in read_json_lines(path):
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object")
        empty = False
        yield where, row
    if empty:
        raise DataError(f"{path} has no lines")


def _text(where: str, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name!r} must be a text that is not empty, not {value!r}")
    return value


def _score(where: str, row: dict[str, Any]) -> float:
    value: Any = row.get("score")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise DataError(f"{where}: 'score' must be a finite number, not {value!r}")
    return float(value)


def _id(where: str, row: dict[str, Any], taken: dict[str, str]) -> str:
    value = row.get("_id")
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: '_id' must be a text or a whole number, not {value!r}")
    if str(value) in taken:
        raise DataError(f"{where}: '_id' {value!r} is there twice")
    return str(value)


def _relevant(where: str, row: dict[str, Any], corpus: dict[str, str]) -> Sequence[str]:
    value = row.get("relevant")
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'relevant' must be a list of ids, at least one, not {value!r}")
    unknown = [one for one in map(str, value) if one not in corpus]
    if unknown:
        raise DataError(f"{where}: document {unknown[0]!r} is not in the corpus")
    return [str(one) for one in value]
