"""Which rank tables constraints allow."""

from __future__ import annotations

import pytest

from matkv.allocate.config import Constraints
from matkv.allocate.space import Space
from matkv.errors import BudgetError, RankError
from matkv.ranks import Geometry, LayerShape

GEOMETRY = Geometry(
    query_heads=4,
    layers=(
        LayerShape(kv_heads=2, head_dim=12),
        LayerShape(kv_heads=2, head_dim=12, window=8),
        LayerShape(kv_heads=2, head_dim=12),
    ),
)


SMALL = Geometry(query_heads=1, layers=(LayerShape(kv_heads=1, head_dim=4),) * 2)


def test_constraints_that_do_not_fit_the_model_are_named() -> None:
    with pytest.raises(RankError, match=r"no multiple of 8 lies in 5\.\.7"):
        Space.of(GEOMETRY, Constraints(multiple=8, min_rank=5, max_rank=7))
    with pytest.raises(RankError, match="layer 1 is not among"):
        Space.of(GEOMETRY, Constraints(protected=(1,)))
    with pytest.raises(RankError, match="no rank to give up"):
        Space.of(GEOMETRY, Constraints(protected=(0, 2)))
    with pytest.raises(BudgetError, match=r"below 0\.5"):
        Space.of(GEOMETRY, Constraints(min_rank=6)).check_budget(0.4)
