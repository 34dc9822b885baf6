"""One round of greedy: the KL of every single drop, measured."""

from __future__ import annotations

from transformers import PreTrainedModel

from matkv.allocate.descent import Descent
from matkv.allocate.divergence import Gated, Text, measure_changes
from matkv.ranks import RankTable


def greedy_round(
    model: PreTrainedModel, gated: Gated, text: Text, path: Descent, *, drops: int, batched: int
) -> tuple[list[int], float]:
    """Measure the KL of every single drop and take the cheapest per column.

    Algorithm 1 of the paper (arXiv 2410.14731) with `drops` = 1. Runs with the gates in place and
    the teacher's logits at hand; returns the drops and the KL before them.
    """
    units, levels = path.space.units, path.levels()
    able = [index for index, unit in enumerate(units) if levels[index] + 1 < len(unit.ladder)]
    changes: dict[int, list[RankTable]] = {}
    for index in able:
        changes.setdefault(units[index].layer, []).append(path.extended([index]).table())
    kl, changed = measure_changes(model, gated, text, path.table(), changes, batched=batched)
    prices = []
    for index in able:
        more = changed[units[index].layer].pop(0) - kl
        prices.append((more / units[index].columns(levels[index], levels[index] + 1), index))
    return [index for _, index in sorted(prices)[:drops]], kl
