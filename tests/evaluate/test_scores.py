"""Accuracies, retention and errors, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from matkv.evaluate.scores import accuracy, bits, difference, summarize


def row(task: str, budget: float | None, right: str, chance: float = 0.25) -> dict[str, Any]:
    acc, stderr = accuracy(right)
    return {
        "task": task,
        "budget": budget,
        "kept": budget or 1.0,
        "n": len(right),
        "chance": chance,
        "acc": acc,
        "stderr": stderr,
        "acc_norm": None,
        "acc_norm_stderr": None,
        "correct": right,
        "correct_norm": None,
    }


def test_accuracy_and_its_standard_error() -> None:
    acc, stderr = accuracy(bits([1.0, 0.0, 1.0, 1.0]))
    assert acc == 0.75
    assert stderr == pytest.approx(math.sqrt(0.25 / 4))  # s² = 3/4 · 1/4 · 4/3
    assert accuracy("1") == (1.0, None)


def test_a_difference_is_paired() -> None:
    """Equal answers differ by nothing and without error, however uncertain each accuracy is."""
    assert difference("1010", "1010") == (0.0, 0.0)
    gap, error = difference("1000", "1010")
    assert gap == -0.25
    assert error == pytest.approx(0.25)
    assert difference("1100", "0011")[1] == pytest.approx(math.sqrt(4 / 3 / 4))


def test_retention_also_above_chance() -> None:
    rows = summarize([row("a", None, "1111100000"), row("a", 0.5, "1111000000")])
    half = rows[1]
    assert half["retention"] == pytest.approx(0.8)
    assert half["retention_above_chance"] == pytest.approx((0.4 - 0.25) / (0.5 - 0.25))
    assert rows[0]["retention"] == rows[0]["retention_above_chance"] == 1
    assert "correct" not in half


def test_no_retention_above_chance_where_the_full_cache_only_guesses() -> None:
    rows = summarize([row("a", None, "1000"), row("a", 0.5, "0000")])
    assert rows[1]["retention"] == 0
    assert rows[1]["retention_above_chance"] is None


def test_averages_count_tasks_alike_and_combine_their_errors() -> None:
    tasks = [row("a", None, "11110000"), row("b", None, "11"), row("a", 0.5, "11000000")]
    rows = summarize([*tasks, row("b", 0.5, "10")])
    full, half = rows[-2:]
    assert [one["task"] for one in rows] == ["a", "b", "a", "b", "average", "average"]
    assert full["acc"] == pytest.approx(0.75)
    assert half["acc"] == pytest.approx(0.375)
    assert (half["n"], half["tasks"]) == (10, 2)
    errors = rows[2]["stderr"], rows[3]["stderr"]
    assert half["stderr"] == pytest.approx(math.hypot(*errors) / 2)
    assert half["difference"] == pytest.approx(-0.375)
    assert half["retention"] == pytest.approx(0.5)
    assert half["retention_above_chance"] == pytest.approx(0.125 / 0.5)
    assert full["difference"] == full["difference_stderr"] == 0


def test_without_the_full_cache_nothing_is_compared() -> None:
    alone, average = summarize([row("a", 0.5, "10")])
    assert alone["retention"] is average["retention"] is alone["difference"] is None
