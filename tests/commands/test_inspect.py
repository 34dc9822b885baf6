"""`matkv inspect`: what an artifact holds, on one screen and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Allocated, Check, Distilled
from matkv.progress import CurvePoint, Spent
from program import Program
from tiny import Tiny


def test_one_screen(run: Path, matkv: Program, gemma3: Tiny) -> None:
    tables = {b: gemma3.artifact.table(b) for b in (0.25, 0.5, 1.0)}
    artifact = replace(
        gemma3.artifact, base_model="org/gemma [bold]", sink=4, recent=16, tables=tables
    )
    point = CurvePoint(step=1, tokens=2, seconds=0.1, loss=1.0, probes={})
    trained = Distilled(
        stages={"end-to-end": Spent(1200, 96, 60.0, (point,) * 50)},
        settings={"lr": list(range(100))},
    )
    checks = (Check(budget=0.25, kl=0.125), Check(budget=0.5, kl=0.0625, uniform_kl=0.75))
    artifact = artifact.with_history(trained).with_history(Allocated(checks=checks, seconds=1.5))
    artifact.save(run)
    ended = matkv("inspect", run)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert len(lines) <= 24
    page = ended.out
    assert "org/gemma [bold]" in page
    assert artifact.digest in page
    assert "2 of 4 layers (1, 3), 2 KV heads of dim 16" in page
    assert "2 of 4 layers (0, 2), 2 KV heads of dim 16, sliding windows of 8 tokens" in page
    assert "the first 4 and the last 16 tokens" in page
    (line,) = [line for line in lines if line.startswith("calibrate")]
    assert "key query · value output" in line
    (line,) = [line for line in lines if line.startswith("distill")]
    assert "end-to-end of 1,200 steps" in line
    assert "{" not in page
    for cells in (["25.0%", "4-4", "0.125"], ["50.0%", "0.062", "0.750"], ["100.0%", "16-16"]):
        assert any(all(cell in line for cell in cells) for line in lines), cells


def test_long_facts_leave_their_names(run: Path, matkv: Program, gemma3: Tiny) -> None:
    settings = {"expansions": 36, "search_tokens": 2048, "held_out_tokens": 4096, "samples": 1}
    replace(gemma3.artifact, base_model="org/" + "long" * 80).with_history(
        Allocated(settings=settings | {"drops": 1, "batched": 1, "seed": 0}, seconds=137.1)
    ).save(run)
    firsts = [line.split("  ")[0] for line in matkv("inspect", run).out.splitlines()]
    for name in ("base model", "bases", "compressed", "exact", "calibrate", "allocate"):
        assert name in firsts


def test_the_energy_is_drawn_when_asked_for(run: Path, matkv: Program) -> None:
    assert "█" not in matkv("inspect", run).out
    assert "█" in matkv("inspect", run, "--energy").out


def test_json_is_complete(run: Path, matkv: Program) -> None:
    artifact = Artifact.load(run)
    found = matkv("inspect", run, "--json").json()
    energy = torch.tensor(found["energy"]["0"]["key"])
    assert energy.sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    config = json.loads((run / "config.json").read_text())
    for name in ("base_model", "geometry", "fingerprint", "sink", "recent", "tables", "history"):
        assert found[name] == config[name], name
    assert found["digest"] == artifact.digest
    assert found["budgets"] == []


def test_commands_take_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matkv: Program
) -> None:
    monkeypatch.setenv("MATKV_CACHE", str(tmp_path))
    shown = matkv("inspect", "smollm2-135m").out
    assert "smollm2-135m" in shown and "25.0%" in shown
