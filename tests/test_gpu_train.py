"""The training for a GPU runs from end to end without one, and what must travel arrives whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import gpu_train
from matkv import MatkvError
from matkv.artifact.artifact import Artifact


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_every_stage_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    gpu_train.main(["--dry-run", "-o", str(tmp_path / "trained")])
    artifact = Artifact.load(tmp_path / "trained")
    stages = [entry["stage"] for entry in artifact.history]
    assert stages == ["calibrate", "allocate", "distill", "allocate"]
    assert sorted(artifact.tables) == [0.25, 0.5]
    assert artifact.tables[0.25].coded
    said = json.loads((tmp_path / "trained" / "gpu_train.json").read_text())
    assert said["written"] == 192
    assert "the last search" in capsys.readouterr().out


def test_what_is_packed_can_be_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "here.bin"
    source.write_bytes(bytes(range(256)) * 40)
    monkeypatch.setattr(gpu_train, "travellers", lambda: iter([("a_model/here.bin", source)]))
    monkeypatch.setattr(gpu_train, "PART", 4096)
    monkeypatch.setattr(sys, "path", [*sys.path])
    parts = gpu_train.pack(tmp_path / "parts")
    assert len(parts) > 2
    assert all(part.stat().st_size <= 4096 for part in parts)
    site = gpu_train.unpack(tmp_path / "parts")
    assert (site / "a_model" / "here.bin").read_bytes() == source.read_bytes()
    assert gpu_train.folder_of("a_model") == site / "a_model"
    parts[1].unlink()
    with pytest.raises(MatkvError, match="lacks a part"):
        gpu_train.unpack(tmp_path / "parts")


def test_two_parts_hold_all_that_travels() -> None:
    try:
        files = [file for _, file in gpu_train.travellers()]
    except MatkvError as error:
        pytest.skip(str(error))
    sizes = [-(-file.stat().st_size // 512) * 512 + 512 for file in files]
    assert gpu_train.PART < sum(sizes) + 10_240 < 2 * gpu_train.PART
    root = Path(gpu_train.__file__).parents[1]
    here = sum(path.stat().st_size for path in root.glob("src/**/*") if path.is_file())
    assert gpu_train.PART + here < 62 << 20


def test_missing_packages_and_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(MatkvError, match="not installed"):
        gpu_train.folder_of("no_such_package")
    with pytest.raises(MatkvError, match="no part"):
        gpu_train.unpack(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_train.main([])
