"""The greedy search, against Algorithm 1 of the paper (arXiv 2410.14731)."""

from __future__ import annotations

from typing import Any

import pytest

from matkv.allocate.config import AllocateConfig, Constraints
from matkv.allocate.stage import allocate
from matkv.progress import Progress
from matkv.ranks import RankTable
from searches import BATCHES, SMALL, attached_kl
from tiny import Tiny


def test_greedy_is_the_papers_algorithm(llama: Tiny) -> None:
    """Against Algorithm 1 written down plainly, on attached models."""
    step, budgets = 8, (0.9, 0.75)
    table, expected = RankTable.full(llama.geometry), {}
    for budget in budgets:
        while table.budget > budget:
            candidates = [lowered(table, *place, step) for place in places(table)]
            table = min(candidates, key=lambda one: attached_kl(llama, BATCHES[2:], one))
        expected[budget] = table
    config = AllocateConfig(
        method="greedy", budgets=budgets, constraints=Constraints(step=step), search_tokens=96,
        held_out_tokens=96,
    )  # fmt: skip
    assert allocate(llama.model, llama.artifact, BATCHES, config).tables == expected


def places(table: RankTable) -> list[tuple[int, Any, int]]:
    return [(layer, side, head) for layer, side, head, rank in table.compressed_ranks() if rank]


def lowered(table: RankTable, layer: int, side: Any, head: int, step: int) -> RankTable:
    data = table.to_json()
    data[side][layer][head] -= step
    return RankTable.from_json(table.geometry, data)


def test_candidates_batched_give_the_same_tables(gemma3: Tiny) -> None:
    tables = [
        allocate(
            gemma3.model, gemma3.artifact, BATCHES,
            AllocateConfig(**SMALL, method="greedy", budgets=(0.7,), batched=batched),
        ).tables
        for batched in (1, 3)
    ]  # fmt: skip
    assert tables[0] == tables[1]


def test_several_drops_a_round(llama: Tiny) -> None:
    rounds: list[Progress] = []
    config = AllocateConfig(**SMALL, method="greedy", budgets=(0.75,), drops=6)
    made = allocate(llama.model, llama.artifact, BATCHES, config, on_progress=rounds.append)
    assert made.tables[0.75].budget == pytest.approx(0.75)
    assert len(rounds) == 4 and rounds[-1].seconds_left == 0
