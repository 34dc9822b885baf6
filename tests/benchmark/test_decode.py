"""Benchmarks on tiny models: their rows are right, whatever the times are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import matkv
from matkv.benchmark.attention import (
    AttentionCase,
    attention_benchmark,
    bands_within,
    ragged_ranks,
)
from matkv.benchmark.decode import BenchmarkConfig, benchmark, random_model, twin
from matkv.benchmark.timing import Spread, milliseconds, take_turns, thread_count, transient_bytes
from matkv.codes import code_bytes
from matkv.errors import BudgetError, MatkvError, ModelError, RankError
from matkv.hf.attach import attached_table
from matkv.models.load import load_config
from matkv.report.pictures.decoding import save_benchmark
from tiny import FAMILIES, Tiny, build, greedy, tokens

SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 16, "context": 32, "rounds": 3}


# ---- timing


def test_a_spread_is_a_median_and_its_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread.of_ratios([2.0, 9.0], [1.0, 3.0]) == Spread(2.5, 2.25, 2.75)


def test_candidates_take_turns_and_warm_up() -> None:
    ran: list[str] = []
    times = take_turns({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 2, warm_up=1)
    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(column) for name, column in times.items()} == {"a": 2, "b": 2}
    assert milliseconds(lambda: None) >= 0


def test_the_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    with thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with thread_count(None):
        assert torch.get_num_threads() == before


def test_transient_bytes_are_those_of_the_work() -> None:
    found = transient_bytes(lambda: torch.ones(50_000_000))
    assert found is None or found > 150_000_000


# ---- attention alone


@pytest.mark.parametrize(
    ("heads", "dim", "budget"), [(32, 128, 0.375), (8, 128, 0.5), (3, 64, 0.375), (4, 16, 0.9)]
)
def test_ragged_ranks_have_the_mean_of_the_budget(heads: int, dim: int, budget: float) -> None:
    for seed in range(5):
        ranks = ragged_ranks(heads, dim, budget, torch.Generator().manual_seed(seed))
        assert sum(ranks) == int(budget * dim * heads / (dim // 8)) * (dim // 8)
        assert all(rank % (dim // 8) == 0 and 0 <= rank <= dim for rank in ranks)
        if 1 / 8 <= budget <= 7 / 8:
            assert min(ranks) >= dim // 8
            assert max(ranks) <= dim - dim // 8
    assert len(set(ragged_ranks(32, 128, 0.375, torch.Generator().manual_seed(0)))) > 3


def test_a_budget_without_ranks_is_refused() -> None:
    with pytest.raises(BudgetError, match="without ranks"):
        ragged_ranks(1, 128, 0.01, torch.Generator())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_alone_reports_a_speedup_and_its_limit(kv_heads: int) -> None:
    result = attention_benchmark(
        AttentionCase(**SMALL | {"kv_heads": kv_heads}, dtype=torch.float32, threads=1)
    )
    assert result["limit"] == pytest.approx(1 / 0.375)
    assert result["threads"] == 1
    assert result["speedup_low"] <= result["speedup"] <= result["speedup_high"]
    assert min(result["full_ms"], result["latent_ms"]) > 0
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("share", [1 / 8, 1 / 4, 3 / 8, 1 / 2, 7 / 8, 1.0])
def test_bands_cost_the_bits_they_are_given(dim: int, share: float) -> None:
    bits = int(16 * dim * share)
    bands = bands_within(bits, dim)
    assert sum(bands) == dim or share < 1 / 4
    spent = 8 * code_bytes(bands) + 16 * bands[0]
    assert bits - 4 * 8 <= spent <= bits + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_alone_takes_codes(dtype: torch.dtype) -> None:
    case = AttentionCase(**SMALL | {"budget": 0.25}, codes=True, dtype=dtype, threads=1)
    result = attention_benchmark(case)
    assert result["limit"] == pytest.approx(4 * dtype.itemsize / 2, rel=0.2)
    assert result["speedup"] > 0


@pytest.mark.parametrize("wrong", [{"context": 0}, {"kv_heads": 3}, {"rounds": 0}, {"batch": -1}])
def test_impossible_attention_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RankError, match=r"must be (above 0|a multiple)"):
        AttentionCase(**SMALL | wrong)
    with pytest.raises(BudgetError):
        AttentionCase(budget=0.0)


# ---- whole models


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    from tiny import tiny

    subject = tiny("gemma3")
    config = BenchmarkConfig(
        contexts=(16, 70), batches=(1, 2), budgets=(1.0, 0.5), steps=2, first_token_context=20
    )
    seen: list[tuple[int, int | None]] = []
    found = benchmark(
        subject.model,
        subject.artifact,
        config,
        on_progress=lambda at: seen.append((at.done, at.total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    return [row.to_json() for row in found]


def test_every_cache_is_measured_in_every_situation(rows: list[dict[str, Any]]) -> None:
    assert [(row["context"], row["batch"]) for row in rows[::4]] == [
        (16, 1),
        (16, 2),
        (70, 1),
        (70, 2),
    ]
    assert [row["name"] for row in rows[:4]] == ["DynamicCache", "StaticCache", "100.0%", "50.0%"]
    for row in rows:
        assert row["step_ms_low"] <= row["step_ms"] <= row["step_ms_high"]
        assert (row["first_token_ms"] is None) == (row["context"] > 20)
        assert 0 <= row["share"] < 1
        assert row["limit"] >= 1
    assert json.loads(json.dumps(rows)) == rows


def test_bytes_are_those_of_the_caches(rows: list[dict[str, Any]]) -> None:
    by_name = {row["name"]: row for row in rows if (row["context"], row["batch"]) == (70, 2)}
    assert by_name["50.0%"]["cache_bytes"] < by_name["DynamicCache"]["cache_bytes"]
    assert by_name["DynamicCache"]["speedup"] == 1
    assert by_name["50.0%"]["kept"] == 0.5
    # Two layers of four hold 7 tokens at full width, the other two 70 at half of it.
    assert by_name["50.0%"]["held"] == (7 + 35) / (7 + 70)
    assert by_name["100.0%"]["held"] == by_name["DynamicCache"]["held"] == 1
    for row in by_name.values():
        assert row["peak_bytes"] is None or (
            row["peak_bytes"] >= row["weight_bytes"] + row["cache_bytes"]
        )


def test_a_benchmark_leaves_the_model_detached(llama: Tiny) -> None:
    expected = greedy(llama.model, tokens(1, 5))
    llama.attach(budget=0.5)
    config = BenchmarkConfig(contexts=(8,), budgets=(0.5,), steps=1, first_token_rounds=0)
    assert benchmark(llama.model, llama.artifact, config)[0].first_token_ms is None
    assert torch.equal(greedy(llama.model, tokens(1, 5)), expected)


@pytest.mark.parametrize("share", [True, False])
def test_a_twin_is_attached_alone(llama: Tiny, share: bool) -> None:
    other = twin(llama.model, share_weights=share)
    ours, theirs = (next(m.parameters()) for m in (llama.model, other))
    assert (ours.data_ptr() == theirs.data_ptr()) == share
    matkv.attach(other, llama.artifact, 0.5)
    with pytest.raises(MatkvError, match="not attached"):
        attached_table(llama.model)
    assert torch.equal(greedy(llama.model, tokens(1, 5)), greedy(build("llama"), tokens(1, 5)))


def test_a_model_needs_no_weights(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    model, again = (random_model(load_config(tmp_path), torch.float32, seed=1) for _ in range(2))
    assert torch.equal(next(model.parameters()), next(again.parameters()))
    artifact = matkv.calibrate(model, [tokens(1, 20)])
    config = BenchmarkConfig(contexts=(8,), budgets=(0.5,), steps=1, first_token_rounds=0)
    assert len(benchmark(model, artifact, config)) == 3


def test_a_missing_config_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config of a model"):
        load_config(tmp_path / "nothing")


@pytest.mark.parametrize(
    "wrong", [{"contexts": ()}, {"contexts": (0,)}, {"batches": (0,)}, {"steps": 0}]
)
def test_impossible_benchmarks_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MatkvError, match=r"at least one of|must be above 0"):
        BenchmarkConfig(**wrong)


# ---- pictures


@pytest.mark.parametrize("memory", [None, 10**6, 1])
def test_pictures_are_drawn(rows: list[dict[str, Any]], tmp_path: Path, memory: int | None) -> None:
    pytest.importorskip("matplotlib")
    paths = save_benchmark(rows, tmp_path / "plots", memory=memory)
    assert [path.name for path in paths] == ["latency.png", "throughput.png", "largest_context.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_no_rows_are_no_picture(tmp_path: Path) -> None:
    with pytest.raises(MatkvError, match="no rows"):
        save_benchmark([], tmp_path)
