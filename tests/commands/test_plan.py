"""`matkv plan`: what a model and its cache will take, from a config alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from program import Program, Word

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
    ended = matkv("plan", home / "model", "--context", 1000, "--budget", 0.5)
    assert ended.code == 0, ended.err
    cells = next(line for line in ended.out.splitlines() if "cache bytes" in line)
    assert f"{1000 * TOKEN_BYTES:,}" in cells
    assert f"{500 * TOKEN_BYTES:,}" in cells
    assert "50.0%" in ended.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "budget 0.0 must be in (0, 1]"),
        (["--memory", "much"], "size 'much' must be like 80GB, 24GiB or 1e9"),
        (["--memory", "0"], "memory 0 must be above 0"),
        (["--bandwidth", "fast"], "size 'fast' must be like"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    home: Path, matkv: Program, options: list[str], message: str
) -> None:
    assert message in matkv("plan", home / "model", "--context", 10, *options).refusal()


def test_a_model_that_is_not_there(tmp_path: Path, matkv: Program) -> None:
    assert "none" in matkv("plan", tmp_path / "none", "--context", 10).refusal()
