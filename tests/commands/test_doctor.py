"""`matkv doctor`, and `matkv --version`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import matkv as package
from matkv.artifact.artifact import Artifact
from program import Program
from tiny import save_model


def test_the_version(matkv: Program) -> None:
    ended = matkv("--version")
    assert (ended.code, ended.out) == (0, f"matkv {package.__version__}\n")


def test_the_machine(matkv: Program) -> None:
    ended = matkv("doctor")
    assert ended.code == 0, ended.err
    for name in (torch.__version__, "threads", "dtype of bfloat16 weights", "GFLOP/s", "float32"):
        assert name in ended.out


def test_the_machine_and_a_run_as_json(run: Path, matkv: Program) -> None:
    found = matkv("doctor", run, "--json").json()
    base = Artifact.load(run).base_model
    assert found["artifact"] == {"run": str(run), "base_model": base, "fits": True, "why": None}
    assert found["dtype"] in ("bfloat16", "float32")
    assert all(speed > 0 for speed in found["gflops"].values())
    assert "fits" in matkv("doctor", run).out


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_run_of_another_model(run: Path, tmp_path: Path, matkv: Program, form: list[str]) -> None:
    save_model(tmp_path / "other", seed=1)
    ended = matkv("doctor", run, "--model", tmp_path / "other", *form)
    assert "weights differ" in ended.refusal()
    assert ended.out
