"""`matkv demo`: the main job from end to end, on a tiny model in seconds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from matkv.allocate.config import AllocateConfig
from matkv.artifact.artifact import Artifact
from matkv.artifact.results import load_rows
from matkv.commands import demo
from matkv.commands.demo_config import DemoConfig
from matkv.distill.config import DistillConfig
from matkv.errors import MatkvError
from program import Program

PNG = b"\x89PNG\r\n\x1a\n"
CURVES = [
    "pca",
    "calibrated",
    "calibrated, 4 exact",
    "distilled, 4 exact",
    "ranks and bits, 4 exact",
]
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, dims, fp32


@pytest.fixture
def small(home: Path, monkeypatch: pytest.MonkeyPatch) -> DemoConfig:
    """Settings of seconds, in place of the demo's own."""
    config = DemoConfig(
        model=str(home / "model"),
        title="a tiny model",
        text=str(home / "text.txt"),
        held_out=str(home / "held-out.txt"),
        budgets=(0.75, 0.5),
        recent=4,
        distill=DistillConfig(steps=4, sequence_length=64, batch_size=2, warmup_steps=1),
        allocate=AllocateConfig(expansions=3, search_tokens=128, held_out_tokens=128),
        calibrate_tokens=512,
        calibrate_length=64,
        score_tokens=256,
        score_length=64,
        resident_tokens=128,
        prompt="Who?",
        answer_budget=0.5,
        answer_tokens=3,
    )
    monkeypatch.setattr(demo, "DemoConfig", lambda: config)
    return config


def test_the_main_job_from_end_to_end(small: DemoConfig, tmp_path: Path, matkv: Program) -> None:
    out = tmp_path / "demo"
    ended = matkv("demo", "-o", out)
    assert ended.code == 0, ended.err
    for name in (*CURVES, "full", "75.0%", "50.0%", "Who?", "128 tokens"):
        assert name in ended.out
    assert (out / "perplexity.png").read_bytes().startswith(PNG)

    stages = {
        name: [entry["stage"] for entry in Artifact.load(out / name).history]
        for name in ("pca", "calibrated", "distilled")
    }
    assert stages == {
        "pca": ["calibrate"],
        "calibrated": ["calibrate"],
        "distilled": ["calibrate", "distill", "allocate"],
    }
    stages_told = [line.partition(":")[0] for line in ended.err.splitlines() if " s" in line[-4:]]
    assert stages_told == [
        *("loading", "calibrating", "scoring", "training", "searching ranks and bits"),
        "scoring",
        "answering",
    ]
    first, last = ended.out.index("before training"), ended.out.index("ranks and bits")
    assert first < last  # there is something to read before the long work
    distilled = Artifact.load(out / "distilled")
    assert sorted(distilled.tables) == [0.5, 0.75]
    assert distilled.recent == 4
    assert distilled.history[0]["tokens"] == 512
    assert distilled.history[1]["stages"]["end-to-end"]["steps"] == 4


def test_what_it_measured_as_json(small: DemoConfig, tmp_path: Path, matkv: Program) -> None:
    result = matkv("demo", "-o", tmp_path, "--json").json()
    assert result["artifacts"] == str(tmp_path)
    assert list(result["rows"]) == CURVES
    full = result["rows"]["pca"][0]
    for rows in result["rows"].values():
        assert [row["budget"] for row in rows] == [None, 0.75, 0.5]
        assert rows[0] | {"artifact": full["artifact"]} == full  # measured once
        assert all(math.isfinite(row["perplexity"]) and row["perplexity"] > 1 for row in rows)
        assert [row["tokens"] for row in rows] == [4 * 63] * 3
        assert rows[0]["bytes_per_token"] > rows[1]["bytes_per_token"] > rows[2]["bytes_per_token"]
    perplexities = {name: rows[2]["perplexity"] for name, rows in result["rows"].items()}
    assert len(set(perplexities.values())) == len(CURVES)  # each curve is a way of its own

    held = result["resident_bytes"]
    assert list(held) == ["None", "0.75", "0.5"]
    assert held["None"] == 128 * TOKEN_BYTES
    assert held["None"] > held["0.75"] > held["0.5"] > 32 * TOKEN_BYTES
    assert list(result["answers"]) == ["prompt", "full cache", "50% of the cache"]
    assert result["answers"]["prompt"] == "Who?"
    assert result["plot"] == str(tmp_path / "perplexity.png")
    assert result["seconds"] > 0


def test_a_report_of_it_shows_what_was_measured(
    small: DemoConfig, tmp_path: Path, matkv: Program
) -> None:
    out = tmp_path / "demo"
    result = matkv("demo", "-o", out, "--json").json()
    assert matkv("report", out / "distilled", "-o", tmp_path / "report").code == 0
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "Nothing was measured" not in page
    for row in result["rows"]["ranks and bits, 4 exact"]:
        assert f"{row['perplexity']:.2f}" in page or f"{row['perplexity']:,.0f}" in page
    assert "Who?" in page
    for name in ("pca", "calibrated"):
        kept = load_rows(out / name, "perplexity")
        assert [row["budget"] for row in kept][:3] == [None, 0.75, 0.5]
        assert all(row["text"] == "held-out.txt" and row["dtype"] == "float32" for row in kept)


def test_the_defaults_are_the_readmes() -> None:
    config = DemoConfig()
    assert (config.model, config.text, config.held_out) == ("smollm2-135m", "default", "default")
    assert (config.distill.minutes, config.recent, config.score_tokens) == (3, 32, 2048)
    assert config.budgets == (0.75, 0.5, 0.375, 0.25)


def test_sizes_and_budgets_are_checked_before_the_work() -> None:
    with pytest.raises(MatkvError, match="score_tokens 0 must be above 0"):
        DemoConfig(score_tokens=0)
    with pytest.raises(MatkvError, match=r"budget 2.0 must be in"):
        DemoConfig(budgets=(0.5, 2))


def test_ctrl_c_ends_with_one_line(
    small: DemoConfig, tmp_path: Path, matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_model", interrupted)
    ended = matkv("demo", "-o", tmp_path / "demo")
    assert ended.code == 130
    assert "interrupted" in ended.err and "Traceback" not in ended.err and not ended.out


def test_a_missing_text_is_one_line_and_nothing_is_written(
    small: DemoConfig, home: Path, tmp_path: Path, matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DemoConfig(model=small.model, text=str(home / "none.txt"))
    monkeypatch.setattr(demo, "DemoConfig", lambda: config)
    assert "none.txt does not exist" in matkv("demo", "-o", tmp_path / "demo").refusal()
    assert not (tmp_path / "demo").exists()
