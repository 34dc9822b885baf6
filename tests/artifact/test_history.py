"""History entries: written and read alike, those of older versions too, and damage is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from matkv.artifact.history import Allocated, Calibrated, Check, Distilled, Entry, entries
from matkv.errors import ArtifactError
from matkv.progress import CurvePoint, Spent
from matkv.schedule import Axis, Cycle
from tiny import tiny

POINT = CurvePoint(step=2, tokens=64, seconds=1.5, loss=0.7, probes={"0.5": 0.9})
TRAINED = Distilled(
    stages={"local": Spent(3, 96, 60.0), "end-to-end": Spent(4, 128, 90.0, (POINT,))},
    interrupted=True,
    schedule=Cycle((Axis("0.key.0", 16, 2), Axis("0.value.0", 16, 2)), ((4, 8), (16, 16))),
    settings={"kl": 0.5, "ce": 1.5, "seed": 3},
)
SEARCHED = Allocated(
    settings={"method": "fisher", "budgets": [0.5]},
    seconds=2.5,
    shares={0.25: 1.0, 0.5: 0.0},
    checks=(Check(budget=0.5, kl=0.1, uniform_kl=0.2), Check(budget=0.25, key_share=0.2)),
)


@pytest.mark.parametrize(
    "entry",
    [Calibrated(settings={"key": "pca"}, tokens=38), TRAINED, SEARCHED, Distilled(), Allocated()],
)
def test_what_a_stage_writes_is_read_back(entry: Entry) -> None:
    written = entry.to_json()
    assert written["stage"] == entry.stage
    assert entries([written], type(entry)) == [entry]
    found = [*entries([written], Calibrated), *entries([written], Distilled)]
    assert [*found, *entries([written], Allocated)] == [entry]


def test_an_artifact_asks_its_last_training() -> None:
    artifact = tiny("llama").artifact
    assert (artifact.smallest_trained_rank, artifact.loss_weights) == (0, (1.0, 0.0))
    trained = artifact.with_history(TRAINED).with_history(SEARCHED)
    assert (trained.smallest_trained_rank, trained.loss_weights) == (4, (0.25, 0.75))
    again = trained.with_history(replace(TRAINED, settings={"kl": 3, "ce": 1}))
    assert again.loss_weights == (0.75, 0.25)


def test_entries_of_older_versions_are_read_as_far_as_they_go() -> None:
    old: list[dict[str, Any]] = [
        {"stage": "calibrate", "key": "query", "value": "output", "skip_first": 0, "tokens": 9},
        {"stage": "distill", "stages": {"local": {"steps": 1, "tokens": 2, "minutes": 0.5}}},
        {"stage": "allocate", "method": "greedy", "tables": [{"budget": 0.5, "kl": 0.1, "x": 1}]},
        {"stage": "something else", "of": "another version"},
    ]
    assert entries(old, Calibrated)[0].settings["value"] == "output"
    (trained,) = entries(old, Distilled)
    assert trained.stages == {"local": Spent(1, 2, 30.0)}
    assert (trained.smallest_rank, trained.loss_weights) == (0, None)
    assert entries(old, Allocated)[0].checks == (Check(budget=0.5, kl=0.1),)


@pytest.mark.parametrize(
    "damage",
    [
        {"stages": []},
        {"stages": {"local": {"steps": 1}}},
        {"schedule": {"kind": "unknown"}},
        {"schedule": 3},
        {"settings": "abc"},
    ],
)
def test_a_damaged_entry_is_named_in_one_line(damage: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="history says of distill is damaged") as error:
        entries([{"stage": "distill"} | damage], Distilled)
    assert "\n" not in str(error.value)
