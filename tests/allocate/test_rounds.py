"""Searches that are cut off, and go on from their state file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from matkv.errors import MatkvError
from matkv.progress import Progress
from searches import BATCHES, FISHER, GREEDY, SMALL
from tiny import Tiny


@pytest.mark.parametrize("config", [FISHER, GREEDY], ids=["fisher", "greedy"])
def test_a_search_goes_on_where_it_was_cut_off(
    llama: Tiny, tmp_path: Path, config: AllocateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    whole: list[Progress] = []
    expected = allocate(llama.model, llama.artifact, BATCHES, config, on_progress=whole.append)
    state = tmp_path / "state.jsonl"

    def interrupt(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING):
        cut = allocate(
            llama.model, llama.artifact, BATCHES, config, state=state, on_progress=interrupt
        )
    assert "interrupted" in caplog.text and cut.history[-1]["interrupted"]
    assert min(cut.tables) > min(expected.tables)
    shared = set(cut.tables) & set(expected.tables)
    assert all(cut.tables[budget] == expected.tables[budget] for budget in shared)
    last = cut.tables[min(cut.tables)]
    assert last.budget == pytest.approx(min(cut.tables), abs=1e-4)
    with state.open("a") as file:
        file.write('{"drops": [1, ')  # a kill in the middle of a line
    rest: list[Progress] = []
    resumed = allocate(
        llama.model, llama.artifact, BATCHES, config, state=state, on_progress=rest.append
    )
    assert resumed.tables == expected.tables
    assert [at.done for at in rest] == [at.done for at in whole][2:]


def test_the_state_of_another_search_is_refused(llama: Tiny, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    allocate(llama.model, llama.artifact, BATCHES, FISHER, state=state)
    other = AllocateConfig(**SMALL, budgets=(0.75, 0.5, 0.25), seed=1)
    with pytest.raises(MatkvError, match="other settings"):
        allocate(llama.model, llama.artifact, BATCHES, other, state=state)
    with pytest.raises(MatkvError, match="other settings"):
        allocate(llama.model, llama.artifact, BATCHES[::-1], FISHER, state=state)
