"""The artifact that comes with the package."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from matkv.artifact.artifact import Artifact
from matkv.artifact.pretrained import SHIPPED, resolved, shipped_names
from matkv.errors import ArtifactError


def test_every_one_loads_by_its_name_and_has_nested_tables() -> None:
    assert shipped_names() == ("smollm2-135m",)
    artifact = Artifact.load("smollm2-135m")
    assert artifact.base_model == "smollm2-135m"
    assert (artifact.sink, artifact.recent) == (4, 32)
    assert {"calibrate", "distill", "allocate"} == {entry["stage"] for entry in artifact.history}
    tables = sorted(artifact.tables.items())
    assert tables[0][0] == 0.0625 and tables[-1][0] >= 0.75
    for budget, table in tables:
        assert table.coded and budget - 0.01 < table.budget <= budget
    for (_, small), (_, large) in pairwise(tables):
        for cell, bands in small.coded.items():
            layer, side, head = cell
            wide = large.bands(layer, side)[head]
            assert all(sum(wide[:upto]) >= sum(bands[:upto]) for upto in range(1, 5))


def test_a_copy_takes_results_and_the_package_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MATKV_CACHE", str(tmp_path / "cache"))
    copy = resolved("smollm2-135m")
    assert copy.is_relative_to(tmp_path) and copy != SHIPPED / "smollm2-135m"
    (copy / "results").mkdir()
    assert resolved("smollm2-135m") == copy and (copy / "results").is_dir()
    assert not (SHIPPED / "smollm2-135m" / "results").exists()
    assert Artifact.load(copy).digest == Artifact.load("smollm2-135m").digest


def test_a_directory_goes_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2-135m").mkdir()
    assert resolved("smollm2-135m") == Path("smollm2-135m")
    with pytest.raises(ArtifactError):
        Artifact.load("smollm2-135m")


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/version").exists(), reason="needs /proc")
def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATKV_CACHE", "/proc/version")
    with pytest.raises(ArtifactError, match="set MATKV_CACHE to another folder"):
        resolved("smollm2-135m")
