"""Two processes share the text and come to the result of one, to the last bit."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from tiny import tiny, tokens

BATCHES = [tokens(2, 24, seed=seed) for seed in range(5)]
OPTIONS: dict[str, Any] = {
    "search_tokens": 96,
    "held_out_tokens": 144,
    "expansions": 2,
    "budgets": (0.9, 0.85),
}


def search(state: Path | None) -> list[dict[str, Any]]:
    """Everything two searches find out."""
    subject, found = tiny("llama"), []
    searches: list[tuple[Any, Any]] = [("fisher", (16,)), ("fisher", None), ("greedy", (16,))]
    for method, codes in searches:
        config = AllocateConfig(method=method, **OPTIONS, codes=codes)
        path = state / f"{method}{len(codes or ())}.jsonl" if state is not None else None
        made = allocate(subject.model, subject.artifact, BATCHES, config, state=path)
        tables = {budget: table.to_json() for budget, table in made.tables.items()}
        found.append({"tables": tables, "checks": made.history[-1]["tables"]})
    return found


def join(rank: int, directory: str) -> list[dict[str, Any]]:
    """The same searches as one of two processes."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=3),
    )
    try:
        return search(Path(directory))
    finally:
        dist.destroy_process_group()


def second(directory: str) -> None:
    torch.set_num_threads(1)
    torch.save(join(1, directory), f"{directory}/second.pt")


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other = mp.get_context("spawn").Process(target=second, args=(str(tmp_path),))
        other.start()
        expected = search(None)
        assert join(0, str(tmp_path)) == expected
        other.join(60)
        assert torch.load(tmp_path / "second.pt") == expected
    finally:
        other.kill()
        torch.set_num_threads(threads)
    lines = (tmp_path / "greedy1.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) > 3
