"""Rows as a report reads them: what is missing is None, never a number."""

from __future__ import annotations

import math
from typing import Any

import pytest

from matkv.artifact.setting import Setting
from matkv.report.pictures.decoding import looks_of, step_panel, throughput_panel
from matkv.report.rows import Measured, Needle, Peer, Row, Scored, Timed, Told, read
from matkv.report.runs import series
from matkv.report.sections.context import _error, _mean
from matkv.report.sections.quality import perplexity_panel

NEEDED: dict[type[Row], tuple[str, ...]] = {
    Measured: ("perplexity",),
    Peer: ("perplexity", "bytes_per_token"),
    Scored: ("acc",),
    Needle: ("context", "accuracy"),
    Timed: ("context", "batch", "step_ms"),
    Told: (),
}


@pytest.mark.parametrize("kind", NEEDED)
def test_a_row_without_what_it_needs_is_none(kind: type[Row]) -> None:
    whole = dict.fromkeys(NEEDED[kind], 1.5)
    row = kind.from_json(whole)
    assert row is not None
    assert row.budget is None
    for name in NEEDED[kind]:
        for wrong in (None, "much", math.nan, math.inf, True):
            assert kind.from_json(whole | {name: wrong}) is None, (name, wrong)


def test_missing_numbers_are_none_and_not_zero() -> None:
    row = Measured.from_json({"perplexity": 12, "budget": 0.5, "stderr": None, "kept": "x"})
    assert row is not None
    assert (row.perplexity, row.stderr, row.kept, row.bytes_per_token) == (12.0, None, None, None)
    assert row.spread is None
    assert row.share == 0.5
    known = Measured(perplexity=10, stderr=0.1, budget=0.5, kept=0.375)
    assert known.spread == pytest.approx((9, 11))
    assert known.share == 0.375


def test_a_budget_that_is_no_number_is_not_the_full_cache() -> None:
    assert read(Measured, [{"perplexity": 9.0, "budget": "half"}]) == []
    assert len(read(Measured, [{"perplexity": 9.0, "budget": None}])) == 1


def test_a_series_for_every_budget_and_way() -> None:
    rows: list[dict[str, Any]] = [
        {"acc": 0.1, "budget": 0.5, "sink": 4, "recent": 16},
        {"acc": 0.2, "budget": 0.5},
        {"acc": 0.3},
        {"acc": 0.4, "budget": 0.75, "uniform": True},
        {"acc": 0.5, "budget": 0.5},
    ]
    found = series(read(Scored, rows))
    assert [(str(one), [row.acc for row in one.rows]) for one in found] == [
        ("full cache", [0.3]),
        ("75%, uniform ranks", [0.4]),
        ("50%", [0.2, 0.5]),
        ("50%, first 4 exact, last 16 exact", [0.1]),
    ]
    assert found[0].way == Setting()


def test_what_was_not_measured_is_not_drawn() -> None:
    rows = read(
        Timed,
        [
            {"name": "DynamicCache", "context": 10, "batch": 1, "step_ms": 2.0},
            {"name": "StaticCache", "context": 10, "batch": 1, "step_ms": 3.0},
            {"budget": 0.5, "context": 10, "batch": 1, "step_ms": 1.0, "tokens_per_second": 7.0},
            {"budget": 0.5, "context": 20, "batch": 1, "step_ms": 1.5, "step_ms_low": 1.0},
        ],
    )
    looks = looks_of(rows, {None: None, 0.5: 0})
    assert looks == {"DynamicCache": None, "StaticCache": 1, "matkv 50%": 0}
    without = step_panel(rows[1:], looks).lines
    assert [(line.label, line.style) for line in without] == [("StaticCache", 1), ("matkv 50%", 0)]
    step = step_panel(rows, looks)
    assert [line.label for line in step.lines] == ["DynamicCache", "StaticCache", "matkv 50%"]
    assert step.lines[2].bounds == [None, None]
    assert throughput_panel(rows, looks).lines == []
    (told,) = throughput_panel(rows[:3], looks).lines
    assert (told.label, told.points) == ("matkv 50%", [(1.0, 7.0)])


def test_errors_over_depths_are_known_where_all_are() -> None:
    rows = [Needle(context=1, accuracy=a, n=n, stderr=e) for a, n, e in
            ((1.0, 30, 0.1), (0.5, 10, 0.3))]  # fmt: skip
    assert _mean(rows) == pytest.approx(0.875)
    assert _error(rows) == pytest.approx(math.hypot(3, 3) / 40)
    assert _error([rows[0], Needle(context=1, accuracy=1.0)]) is None


def test_no_level_without_a_full_cache() -> None:
    from matkv.report.pictures.figures import Axis

    assert perplexity_panel("", Axis(label="x"), [], None).levels == []
    (level,) = perplexity_panel("", Axis(label="x"), [], Measured(perplexity=9.5)).levels
    assert level == (9.5, "full cache 9.50")
