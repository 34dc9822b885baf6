"""`matkv plan`: what a model and its cache will take, from a config alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import matkv as package
from matkv.commands.tables import bytes_text
from matkv.ranks import RankTable
from program import Program, Word
from tiny import FAMILIES, build

# Of the tiny Llama: 2 layers × keys and values × 2 KV heads × 8 dims × fp32.
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4


def test_bytes_of_full_and_compressed_cache_as_json(home: Path, matkv: Program) -> None:
    plan = matkv(
        "plan", home / "model", "--context", 100, "--batch", 3, "--budget", 0.25, "--json"
    ).json()
    assert (plan["model_type"], plan["dtype"], plan["budget"]) == ("llama", "float32", 0.25)
    assert plan["weight_bytes"] == 4 * plan["parameters"]
    full, compressed = plan["full"], plan["compressed"]
    assert full["cache_bytes"] == 300 * TOKEN_BYTES
    assert compressed["cache_bytes"] == 300 * TOKEN_BYTES // 4
    assert full["bases_bytes"] == 0 < compressed["bases_bytes"]
    for way in (full, compressed):
        parts = plan["weight_bytes"] + way["bases_bytes"] + way["cache_bytes"]
        assert way["total_bytes"] == parts
        assert way["decode_ms"] == pytest.approx(1e3 * parts / 3.35e12)
        assert way["fits"] is way["largest_batch"] is way["largest_context"] is None


def test_what_fits_into_a_memory(home: Path, matkv: Program) -> None:
    asked: list[Word] = ["plan", home / "model", "--context", 100, "--json", "--bandwidth", "1G"]
    weights = matkv(*asked).json()["weight_bytes"]
    plan = matkv(*asked, "--memory", weights + 250 * TOKEN_BYTES).json()
    full, compressed = plan["full"], plan["compressed"]
    assert (full["fits"], full["largest_batch"], full["largest_context"]) == (True, 2, 250)
    assert compressed["largest_context"] > 250
    assert full["decode_ms"] == pytest.approx(full["total_bytes"] / 1e6)
    tight = matkv(*asked, "--memory", weights + 50 * TOKEN_BYTES).json()["full"]
    assert (tight["fits"], tight["largest_batch"], tight["largest_context"]) == (False, 0, 50)


def test_a_table_side_by_side(home: Path, matkv: Program) -> None:
    ended = matkv("plan", home / "model", "--context", 100_000, "--budget", 0.5, "--memory", "20MB")
    assert ended.code == 0, ended.err
    rows = {line.split("  ")[0].strip("│ "): line for line in ended.out.splitlines()}
    cells = {name: re.findall(r"[\d.,]+ \w+", line) for name, line in rows.items()}
    assert cells["cache"] == [bytes_text(100_000 * TOKEN_BYTES), bytes_text(50_000 * TOKEN_BYTES)]
    assert cells["each further token"] == ["256 bytes", "128 bytes"]
    assert "fits in 20.0 MB" in rows
    assert re.findall("yes|no", rows["fits in 20.0 MB"]) == ["no", "yes"]
    assert "decoding step at 3.35 TB/s, H100 SXM" in ended.out
    assert "budget 50.0%" in ended.out
    assert "the budget is of all 2 layers; held are 50.0% of the whole cache's bytes" in ended.out


def test_layers_that_stay_are_counted_and_said(tmp_path: Path, matkv: Program) -> None:
    config = FAMILIES["gemma3"]()
    config.dtype = "float32"
    config.save_pretrained(tmp_path)
    asked: list[Word] = ["plan", tmp_path, "--context", 100, "--bandwidth", "50G"]
    plan = matkv(*asked, "--json").json()
    assert (plan["layers"], plan["compressed_layers"]) == (4, 2)
    full, compressed = plan["full"], plan["compressed"]
    stays = 2 * 7 * 2 * 2 * 16 * 4  # 2 layers × 7 tokens × keys and values × 2 heads × 16 × fp32
    assert full["staying_bytes"] == compressed["staying_bytes"] == stays
    assert full["cache_bytes"] - stays == 2 * (compressed["cache_bytes"] - stays)
    share = compressed["cache_bytes"] / full["cache_bytes"]
    page = matkv(*asked).out
    assert "2 of 4 layers have a sliding window and stay as they are" in page
    said = f"50.0% of the others is {share:.1%} of the whole cache's bytes"
    assert said in " ".join(page.split())
    assert "decoding step at 50.0 GB/s " in page


@pytest.mark.parametrize("fast", [True, False])
def test_the_dtype_is_the_one_that_the_model_would_run_in(
    home: Path,
    tmp_path: Path,
    matkv: Program,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fast: bool,
) -> None:
    model, tokenizer = package.load_model(home / "model")
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("matkv.models.dtype.has_fast", lambda dtype, device: fast)
    asked: list[Word] = ["plan", tmp_path, "--context", 100]
    plan = matkv(*asked, "--json").json()
    assert ("runs in float32" in caplog.text) is not fast
    loaded, _ = package.load_model(tmp_path)
    assert plan["dtype"] == str(loaded.dtype).removeprefix("torch.")
    assert plan["weight_bytes"] == sum(p.nbytes for p in loaded.parameters())
    forced = matkv(*asked, "--dtype", "float16", "--json").json()
    assert (forced["dtype"], forced["weight_bytes"]) == ("float16", 2 * plan["parameters"])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1536, "1.54 kB"), (1.5e9, "1.50 GB"), (24e9, "24.0 GB"),
     (999_999, "1,000 kB"), (3.35e12, "3.35 TB"), (5e15, "5,000 TB")],
)  # fmt: skip
def test_bytes_are_in_powers_of_a_thousand(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "budget 0.0 must be in (0, 1]"),
        (["--memory", "much"], "size 'much' must be like 80GB, 24GiB or 1e9"),
        (["--memory", "0"], "size '0' must be like"),
        (["--bandwidth", "fast"], "size 'fast' must be like"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    home: Path, matkv: Program, options: list[str], message: str
) -> None:
    assert message in matkv("plan", home / "model", "--context", 10, *options).refusal()


def test_a_model_that_is_not_there(tmp_path: Path, matkv: Program) -> None:
    assert "none" in matkv("plan", tmp_path / "none", "--context", 10).refusal()


def test_a_run_is_planned_with_its_own_table_and_its_exact_tokens(
    home: Path, run: Path, tmp_path: Path, matkv: Program
) -> None:
    artifact = package.Artifact.load(run)
    table = RankTable.uniform(artifact.geometry, 0.25)
    saved = replace(artifact, tables={0.5: table}, sink=2, recent=3)
    saved.save(tmp_path / "searched")
    asked: list[Word] = ["plan", home / "model", "--run", tmp_path / "searched", "--budget", 0.5]
    plan = matkv(*asked, "--context", 100, "--json").json()
    held = table.nbytes(100, torch.float32, sink=2, recent=3)
    assert plan["compressed"]["cache_bytes"] == held
    assert "5 tokens exact" in " ".join(matkv(*asked, "--context", 100).out.split())


def test_a_run_of_another_model_is_refused(home: Path, tmp_path: Path, matkv: Program) -> None:
    build("qwen2").config.save_pretrained(tmp_path / "other")
    ended = matkv("plan", tmp_path / "other", "--run", home / "run", "--context", 10)
    assert ended.code == 2
    assert "the artifact was made for" in ended.err
