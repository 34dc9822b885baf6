"""Results kept beside an artifact: merged by key, whole after a failure, tied to their bases."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from matkv.artifact.records import made
from matkv.artifact.results import Kind, Results, load_rows
from matkv.artifact.setting import FULL, Setting, was_uniform
from matkv.errors import ArtifactError, BudgetError, RankError
from matkv.ranks import RankTable
from tiny import tiny

TASKS = Kind("tasks", ("task", "budget"))


def test_rows_with_equal_keys_are_replaced_and_others_kept(tmp_path: Path) -> None:
    Results(tmp_path, TASKS).put([{"task": "a", "budget": None, "acc": 1}])
    kept = Results(tmp_path, TASKS)
    kept.put([{"task": "a", "budget": 0.5, "acc": 2}, {"task": "a", "budget": None, "acc": 3}])
    rows = load_rows(tmp_path, "tasks")
    assert [(row["budget"], row["acc"]) for row in rows] == [(None, 3), (0.5, 2)]
    assert kept.rows == Results(tmp_path, TASKS).rows == rows
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["tasks.json"]


def test_rows_that_another_process_keeps_meanwhile_stay(tmp_path: Path) -> None:
    ours, theirs = Results(tmp_path, TASKS), Results(tmp_path, TASKS)
    theirs.put([{"task": "b", "budget": None}])
    ours.put([{"task": "a", "budget": None}])
    assert [row["task"] for row in load_rows(tmp_path, "tasks")] == ["b", "a"]


def test_what_is_known_is_found_unless_it_is_measured_again(tmp_path: Path) -> None:
    row = {"task": "a", "budget": 0.5, "acc": 1}
    Results(tmp_path, TASKS).put([row])
    about = {"task": "a", "budget": 0.5, "uniform": True}
    assert Results(tmp_path, TASKS).find(about) == row | about
    assert Results(tmp_path, TASKS).find({"task": "a", "budget": None}) is None
    assert Results(tmp_path, TASKS, again=True).find(about) is None


def test_nothing_measured_is_no_rows_and_not_a_number_is_null(tmp_path: Path) -> None:
    assert load_rows(tmp_path, "perplexity") == []
    Results(tmp_path, Kind("perplexity", ("stderr",))).put([{"stderr": math.nan}])
    text = (tmp_path / "results" / "perplexity.json").read_text()
    assert json.loads(text) == {"kind": "perplexity", "rows": [{"stderr": None}]}


def test_rows_are_kept_in_a_file_of_any_name_or_nowhere(tmp_path: Path) -> None:
    for file in (tmp_path / "mine" / "rows.json", None):
        kept = Results(None, TASKS, file=file)
        (row,) = kept.add([{"task": "a"}], seed=3)
        assert row["made"]["seed"] == 3
        assert Results(None, TASKS, file=file).rows == ([] if file is None else [row])
    assert [path.name for path in tmp_path.rglob("*.json")] == ["rows.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"rows": [1]}', "[" * 100_000])
@pytest.mark.parametrize("again", [False, True])
def test_a_damaged_file_is_named_and_kept(tmp_path: Path, text: str, again: bool) -> None:
    path = tmp_path / "results" / "tasks.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"tasks\.json is damaged"):
        Results(tmp_path, TASKS, again=again)
    assert path.read_text() == text


# ---- older rows


def test_older_rows_are_read_as_they_were_meant(tmp_path: Path) -> None:
    """A full cache of any spelling, a window of exact tokens, and none said: the artifact's."""
    run = replace(tiny("llama").artifact, sink=2, recent=8).save(tmp_path / "run")
    old = [
        {"artifact": "a", "ranks": None, "budget": None, "sink": 0, "window": 0, "uniform": False},
        {"artifact": "a", "ranks": "r", "budget": 0.5, "sink": 1, "window": 3},
        {"artifact": "a", "ranks": "r", "budget": 0.5, "name": "50.0%"},
        {"method": "ThinK", "budget": 0.5},
    ]
    (run / "results").mkdir()
    (run / "results" / "x.json").write_text(json.dumps({"kind": "x", "rows": old}))
    full, said, silent, peer = load_rows(run, "x")
    assert full == FULL | {"artifact": "a"}
    assert (said["sink"], said["recent"]) == (1, 3) and "window" not in said
    assert (silent["sink"], silent["recent"]) == (2, 8)
    assert peer == old[3]


# ---- settings


def test_every_kind_of_row_spells_its_cache_alike() -> None:
    artifact = replace(tiny("llama").artifact, sink=1, recent=8)
    full = Setting(uniform=True, sink=2, recent=3).record(artifact, torch.bfloat16)
    assert full == FULL | {"artifact": artifact.digest, "dtype": "bfloat16"}
    half = Setting(budget=0.5, recent=3).record(artifact, torch.float32)
    assert list(half) == list(full)
    assert {name: half[name] for name in ("budget", "uniform", "sink", "recent")} == {
        "budget": 0.5,
        "uniform": False,
        "sink": 1,
        "recent": 3,
    }
    assert half["ranks"] == artifact.table(0.5).digest


def test_a_way_is_set_at_a_budget_and_says_what_is_special_of_it() -> None:
    way = Setting(uniform=True, sink=4, recent=32)
    assert way.at(0.5) == Setting(budget=0.5, uniform=True, sink=4, recent=32)
    assert str(way) == "uniform ranks, first 4 exact, last 32 exact"
    assert str(Setting(budget=0.5, recent=0)) == ""
    with pytest.raises(BudgetError):
        way.at(1.5)
    with pytest.raises(RankError, match="recent -1 must be 0 or more"):
        Setting(recent=-1)


def test_ranks_tell_whether_they_were_uniform_also_after_a_search() -> None:
    artifact = tiny("llama").artifact
    half = Setting(budget=0.5)
    before = half.record(artifact, torch.float32)
    assert was_uniform(before, artifact) is False  # nothing else is there
    skewed = RankTable.uniform_sides(artifact.geometry, 0.25, 0.75)
    searched = replace(artifact, tables={0.5: skewed})
    assert was_uniform(before, searched) is True
    assert was_uniform(half.record(searched, torch.float32), searched) is False
    assert was_uniform(half.record(searched, torch.float32), artifact) is None
    assert was_uniform({"budget": 0.33, "ranks": "other"}, artifact) is None
    full = Setting().record(searched, torch.float32)
    assert was_uniform(full, searched) is False
    own = Setting(budget=1.0, uniform=True).record(searched, torch.float32)
    assert was_uniform(own, searched) is False


def test_a_digest_tells_bases_and_tables_apart() -> None:
    artifact = tiny("llama").artifact
    layer = next(iter(artifact.bases))
    maps = artifact.maps(layer, "key")
    turned = replace(maps, encode_XDD=-maps.encode_XDD)
    sides = dict(artifact.bases[layer])
    sides["key"] = replace(sides["key"], maps=turned)
    other = replace(artifact, bases={**artifact.bases, layer: sides})
    assert artifact.digest == replace(artifact, sink=4).digest
    assert artifact.digest != other.digest
    half, full = (RankTable.uniform(artifact.geometry, budget) for budget in (0.5, 1.0))
    assert half.digest != full.digest


def test_made_says_when_on_what_and_how() -> None:
    record = made(seed=3)
    assert record["seed"] == 3
    assert record["versions"]["torch"]
    assert "/" not in record["command"].split(" ")[0]
