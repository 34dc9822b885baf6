"""The one command for a GPU runs from end to end without one, so that no lease goes to a typo."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import gpu as benchmark


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_every_part_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "-o", str(out)])
    benchmark.main()
    found = json.loads(out.read_text())
    assert set(benchmark.PARTS) < set(found)
    for part in benchmark.PARTS:
        assert found[part]
        assert not [row for row in found[part] if "failed" in row or "left_out" in row]
    assert len(found["exactness"]) == 2 * len({**benchmark.MIXES, **benchmark.CODED})
    assert all(row["passes"] for row in found["exactness"])
    names = {row["cache"] for row in found["whole model"]}
    assert names == {"full", "25.00%", "25.00% codes"}
    kernels = {row["kernel"] for row in found["decode attention"]}
    assert {"25.00%", "25.00% codes"} < kernels
    bytes_of = {
        row["cache"]: row["cache_bytes"] for row in found["whole model"] if row.get("batch") == 2
    }
    assert bytes_of["25.00% codes"] < bytes_of["full"]  # spare room counts here
    plain, sharded = found["training"]
    assert sharded["passes"]
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert len(set(plain["losses"])) == 3  # it learns
    said = capsys.readouterr().out
    assert "0 not within bounds" in said
    assert "FSDP, one process" in said


def test_a_part_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: benchmark.Plan) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(benchmark, "PARTS", {"broken": broken, "ceilings": benchmark.ceilings})
    found = benchmark.measure(benchmark.dry_plan(), 60.0)
    assert found["broken"] == [{"failed": "RuntimeError: no such kernel"}]
    assert [row["what"] for row in found["ceilings"]] == ["copy", "matmul"]


def test_time_that_is_up_is_said() -> None:
    found = benchmark.measure(benchmark.dry_plan(), 0.0)
    assert found["ceilings"][-1] == {"left_out": "the rest: the time was up"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
