"""`matkv report`, what its samples are, and the rows that `matkv benchmark` leaves for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import matkv
from matkv import cli
from matkv.artifact import results
from matkv.artifact.artifact import Artifact
from matkv.artifact.setting import Setting
from matkv.cache.cache import LatentCache
from matkv.evaluate import samples
from matkv.report.page import Table
from matkv.report.runs import read_runs
from matkv.report.sections.speed import speed_section
from report_rows import stub
from tiny import save_model, tokens


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact of a tiny model in a directory; pictures are not drawn."""
    monkeypatch.setattr("matkv.report.pictures.figures.picture", stub)
    monkeypatch.setattr("matkv.report.pictures.maps.picture", stub)
    save_model(tmp_path / "model")
    model, _ = matkv.load_model(str(tmp_path / "model"))
    artifact = matkv.calibrate(model, [tokens(2, 48)])
    return artifact.save(tmp_path / "run")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["matkv", *arguments])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_samples_are_generated_kept_and_shown(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.parent / "out"
    options = ["--samples", "--prompt", "Who <are> you?", "--budget", "0.5", "--budget", "1"]
    code = call(
        monkeypatch, "report", str(run), "-o", str(out), *options, "--max-new-tokens", "6", "--json"
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert json.loads(captured.out)["page"] == str(out / "index.html")
    rows = results.load_rows(run, "samples")
    assert [row["budget"] for row in rows] == [None, 0.5, 1.0]
    assert {row["artifact"] for row in rows} == {Artifact.load(run).digest}
    texts = {row["budget"]: row["text"] for row in rows}
    assert texts[None] == texts[1.0]
    assert "Who &lt;are&gt; you?" in (out / "index.html").read_text(encoding="utf-8")
    # Asked again they take the place of the old ones.
    call(monkeypatch, "report", str(run), "-o", str(out), *options, "--max-new-tokens", "6")
    assert len(results.load_rows(run, "samples")) == 3


def test_samples_are_what_generate_says(run: Path) -> None:
    artifact = Artifact.load(run)
    model, tokenizer = matkv.load_model(artifact.base_model)
    (full, half) = samples.sample_texts(
        model,
        tokenizer,
        artifact,
        [Setting(), Setting(budget=0.5)],
        results.Results(None, samples.SAMPLES),
        ["Hello"],
        max_new_tokens=8,
    )
    ids = samples.chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])
    generate: Any = model.generate
    plain = generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert full["text"] == tokenizer.decode(plain, skip_special_tokens=True)
    matkv.attach(model, artifact, budget=0.5)
    small = generate(
        torch.tensor([ids]), max_new_tokens=8, do_sample=False, past_key_values=LatentCache(model)
    )[0, len(ids) :]
    assert half["text"] == tokenizer.decode(small, skip_special_tokens=True)


def test_prompts_without_samples_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "report", str(run), "--prompt", "Hello") == 2
    assert "--samples" in capsys.readouterr().err


def test_an_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "report", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err.startswith("error: no artifact at")


def test_benchmark_keeps_its_rows_beside_the_artifact(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--context", "16", "--budget", "0.5", "--steps", "1", "--json"]
    assert call(monkeypatch, "benchmark", str(run), *options) == 0
    printed = json.loads(capsys.readouterr().out)["rows"]
    rows = results.load_rows(run, "benchmark")
    assert [row["name"] for row in rows] == [row["name"] for row in printed]
    artifact = Artifact.load(run)
    ranks = artifact.table(0.5).digest
    assert [row["ranks"] for row in rows] == [None, None, ranks]
    assert {row["artifact"] for row in rows} == {artifact.digest}
    assert {row["made"]["seed"] for row in rows} == {0}
    # With other exact tokens it is another measurement: the rows before stay.
    assert call(monkeypatch, "benchmark", str(run), *options, "--recent", "8") == 0
    capsys.readouterr()
    rows = [row for row in results.load_rows(run, "benchmark") if row["budget"] == 0.5]
    assert [row["recent"] for row in rows] == [0, 8]
    more = 8 * (artifact.table(1).bytes_per_token(torch.float32) // 2)
    assert rows[1]["cache_bytes"] >= rows[0]["cache_bytes"] + more
    tables = [one for one in speed_section(read_runs([run])).blocks if isinstance(one, Table)]
    names = [line[0].text for line in tables[0].rows]
    assert names[-2:] == ["matkv 50%", "matkv 50%, last 8 exact"]
