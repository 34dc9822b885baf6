"""One round of each search: from what is measured where a path stands to the next drops."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from matkv.divergence import Gated, Text, measure_changes
from matkv.ranks import RankTable
from matkv.search import Path, descend
from matkv.sensitivity import Sensitivity, averaged

# `expansions` counts the rounds of a fisher search from full rank to this budget.
LOWEST = 0.125
# How much faster than the average one unit may shrink in a fisher round.
REACH = 4
# A round averages the expansions of so many rounds, each weighing this much of the next one.
MEMORY, FADING = 4, 0.5


def fisher_drops(path: Path, recent: Sequence[Sensitivity], *, expansions: int) -> list[int]:
    """The cheapest drops to the next mark, by expansions of the KL where the path stands.

    One expansion at full rank would not do: the error of a drop grows with those of all the others,
    which the slopes see only where those have been taken. `recent` holds the expansions of the last
    rounds, this one last; averaging over them halves what noise spoils at small budgets. The marks
    are equal relative steps, because what is left matters more the less is left.
    """
    now = path.table().budget
    mark = max(now * LOWEST ** (1 / expansions), path.space.smallest)
    costs = averaged(recent, FADING).costs(path.space, path.levels())
    return descend(path, costs, mark, reach=REACH * (now - mark))


def greedy_round(
    model: PreTrainedModel, gated: Gated, text: Text, path: Path, *, drops: int, batched: int
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
    kl, found = measure_changes(model, gated, text, path.table(), changes, batched=batched)
    prices = []
    for index in able:
        more = found[units[index].layer].pop(0) - kl
        prices.append((more / units[index].columns(levels[index], levels[index] + 1), index))
    return [index for _, index in sorted(prices)[:drops]], kl
