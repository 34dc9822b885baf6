"""Results kept beside an artifact: merged by key, whole after a failure, tied to their bases."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from matkv.artifact import results
from matkv.artifact.artifact import digest
from matkv.artifact.records import made
from matkv.errors import ArtifactError
from matkv.ranks import RankTable, digest_of
from tiny import tiny


def test_rows_with_equal_keys_are_replaced_and_others_kept(tmp_path: Path) -> None:
    keys = ("task", "budget")
    results.save_rows(tmp_path, "tasks", [{"task": "a", "budget": None, "acc": 1}], keys)
    path = results.save_rows(
        tmp_path,
        "tasks",
        [{"task": "a", "budget": 0.5, "acc": 2}, {"task": "a", "budget": None, "acc": 3}],
        keys,
    )
    rows = results.load_rows(tmp_path, "tasks")
    assert [(row["budget"], row["acc"]) for row in rows] == [(None, 3), (0.5, 2)]
    assert [one.name for one in path.parent.iterdir()] == ["tasks.json"]


def test_nothing_measured_is_no_rows_and_not_a_number_is_null(tmp_path: Path) -> None:
    assert results.load_rows(tmp_path, "perplexity") == []
    path = results.save_rows(tmp_path, "perplexity", [{"stderr": math.nan}], ("stderr",))
    assert json.loads(path.read_text()) == {"kind": "perplexity", "rows": [{"stderr": None}]}


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"rows": [1]}'])
def test_a_damaged_file_is_named_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results" / "tasks.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"tasks\.json is damaged"):
        results.save_rows(tmp_path, "tasks", [{"task": "a"}], ("task",))
    assert path.read_text() == text


def test_a_digest_tells_bases_and_tables_apart() -> None:
    artifact = tiny("llama").artifact
    layer = next(iter(artifact.bases))
    maps = artifact.maps(layer, "key")
    turned = replace(maps, encode_XDD=-maps.encode_XDD)
    sides = dict(artifact.bases[layer])
    sides["key"] = replace(sides["key"], maps=turned)
    other = replace(artifact, bases={**artifact.bases, layer: sides})
    assert digest(artifact) == digest(replace(artifact, sink=4))
    assert digest(artifact) != digest(other)
    half, full = (RankTable.uniform(artifact.geometry, budget) for budget in (0.5, 1.0))
    assert digest_of(half) != digest_of(full)
    assert digest_of(None) is None


def test_made_says_when_on_what_and_how() -> None:
    record = made(seed=3)
    assert record["seed"] == 3
    assert record["versions"]["torch"]
    assert "/" not in record["command"].split(" ")[0]
