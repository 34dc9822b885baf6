"""Sizes that no memory holds are refused at once, in one line."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import pytest
import torch

from lessons import quick, text
from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from matkv.distill.stage import distill
from matkv.errors import MatkvError, TrainingError
from matkv.hf import memory
from matkv.hf.memory import check_fits, memory_of
from tiny import Tiny, tokens

CPU = torch.device("cpu")


def test_what_fits_is_let_through_and_what_does_not_says_how_much() -> None:
    there = memory_of(CPU)
    assert there is not None and there > 2**30
    check_fits(there, CPU, "this")
    with pytest.raises(
        TrainingError, match=r"batch 9 takes [\d,.]+ GB at least, and cpu has .* GB"
    ):
        check_fits(there + 1, CPU, "batch 9", TrainingError)


def test_a_system_that_does_not_tell_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf_names", {})
    assert memory_of(CPU) is None
    check_fits(2**70, CPU, "this")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"held_out_tokens": 2**31 - 1}, "2147483647 tokens to verify on takes"),
        ({"search_tokens": 2**31 - 1}, "2147483647 tokens to search on takes"),
    ],
)
@pytest.mark.parametrize("method", ["fisher", "greedy"])
def test_text_without_end_is_not_read_for_ever(
    llama: Tiny, settings: dict[str, Any], named: str, method: Any
) -> None:
    sizes = {"held_out_tokens": 48} | settings
    config = AllocateConfig(method=method, **sizes)
    with pytest.raises(MatkvError, match=named):
        allocate(llama.model, llama.artifact, repeat(tokens(2, 24)), config)


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("fisher", {"samples": 2**16}, "samples 65536 takes 20.1 GB at least, and cpu has 0.1 GB"),
        ("greedy", {"batched": 2**16}, "batched 65536 takes 0.2 GB at least"),
    ],
)
def test_searches_that_are_too_wide_are_refused(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, method: Any, settings: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 10**8)
    sizes: dict[str, Any] = {"search_tokens": 40_000, "held_out_tokens": 48, "expansions": 1}
    sizes["codes"] = (16,)
    config = AllocateConfig(method=method, **sizes, **settings)
    with pytest.raises(MatkvError, match=named):
        allocate(llama.model, llama.artifact, repeat(tokens(400, 100)), config)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"objective": "local", "local_batch_size": 2**16}, "local_batch_size 65536 takes 1.6 GB"),
        ({"lora_rank": 2**16}, "lora_rank 65536 takes 1.4 GB"),
        ({"batch_size": 2**16}, "a micro batch of 65536 sequences at 1 draws of ranks takes"),
        (
            {"schedule": "sandwich", "random": 2**16},
            "a micro batch of 4 sequences at 65538 draws of ranks takes",
        ),
    ],
)
def test_batches_that_are_too_large_are_refused_before_training(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 10**8)
    with pytest.raises(TrainingError, match=named):
        distill(llama.model, llama.artifact, text(), quick(**settings))
