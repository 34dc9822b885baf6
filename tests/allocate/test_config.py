"""Settings of a search: what is refused, and the ladders that constraints make."""

from __future__ import annotations

from typing import Any

import pytest

from matkv.allocate.config import AllocateConfig, Constraints
from matkv.errors import MatkvError, RankError


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "best"}, "method 'best'"),
        ({"budgets": ()}, "no budget"),
        ({"budgets": (0.5, 1.5)}, r"budget 1\.5"),
        ({"search_tokens": 0}, "search_tokens 0"),
        ({"drops": 0}, "drops 0"),
        ({"max_kl": -1.0}, "max_kl -1"),
        ({"max_perplexity_increase": float("nan")}, "max_perplexity_increase nan"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(MatkvError, match=named):
        AllocateConfig(**options)


def test_steps_go_down_from_the_head_dim_to_the_lowest_rank() -> None:
    assert Constraints().ladder(12, 5) == (12, 7, 2, 0)
    assert Constraints(min_rank=3).ladder(12, 4) == (12, 8, 4, 3)
    assert Constraints(multiple=8).ladder(20, 1) == (20, 16, 8, 0)
    assert Constraints(multiple=8, max_rank=18, min_rank=5).ladder(20, 8) == (16, 8)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"step": 0}, "step 0"),
        ({"multiple": 0}, "multiple 0"),
        ({"min_rank": -1}, "min_rank -1"),
        ({"min_rank": 8, "max_rank": 4}, "max_rank 4"),
    ],
)
def test_impossible_constraints_are_named(options: dict[str, int], named: str) -> None:
    with pytest.raises(RankError, match=named):
        Constraints(**options)  # type: ignore[arg-type]


def test_ranks_stop_at_the_smallest_trained_unless_told_otherwise() -> None:
    assert Constraints().above(3).ladder(12, 4) == (12, 8, 4, 3)
    assert Constraints(min_rank=0).above(3).ladder(12, 4) == (12, 8, 4, 0)
    assert Constraints(max_rank=2).above(3).ladder(12, 4) == (2,)
