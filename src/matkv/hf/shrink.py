"""Shrink: a running generation goes on at a smaller budget, with the tokens it holds."""

from __future__ import annotations

from torch import nn

from matkv.cache.cache import LatentCache, attached_projections
from matkv.cache.layer import LatentLayer
from matkv.errors import BudgetError, CacheError, MatkvError
from matkv.hf.attach import attach, attachment_of
from matkv.ranks import RankTable


def shrink(model: nn.Module, cache: LatentCache, budget: float) -> RankTable:
    """Attach the model at a smaller budget, and bring what `cache` holds to it.

    The cache equals one filled at the smaller table, up to a second rounding of codes, where the
    table keeps no column that the cache has dropped: tables of one search with bits are nested.
    Returns the table; nothing changes on errors.

    Raises:
        MatkvError: the model is not attached.
        BudgetError: the budget is no smaller than that of the model now.
        CacheError: the cache is not of the model's bases.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise MatkvError("the model is not attached: call matkv.attach(model, artifact, budget)")
    table = attachment.artifact.table(budget)
    if table.budget >= attachment.table.budget:
        raise BudgetError(
            f"the model is attached at {attachment.table.budget:.4g} already: {budget:g} is no "
            "smaller"
        )
    now = attached_projections(model)
    layers = {
        index: layer for index, layer in enumerate(cache.layers) if isinstance(layer, LatentLayer)
    }
    if set(layers) != set(now) or any(
        layer.projection.source != now[index].source for index, layer in layers.items()
    ):
        raise CacheError("the cache is not of this model's bases: it cannot shrink with it")
    sink, recent = next((one.sink, one.recent) for one in now.values())
    attach(model, attachment.artifact, ranks=table, sink=sink, recent=recent)
    for index, projection in attached_projections(model).items():
        layers[index].narrow(projection)
    return table
