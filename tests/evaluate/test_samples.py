"""Answers to prompts: decided by their seed, and without a trace in global randomness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from matkv.errors import MatkvError
from matkv.evaluate.samples import generate
from tiny import save_model

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_answers_follow_their_seed_and_leave_global_randomness_alone(loaded: Loaded) -> None:
    state = torch.get_rng_state()
    answers = [
        generate(*loaded, [5, 6, 7], None, None, 12, temperature=2.0, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_prompt_is_refused(loaded: Loaded) -> None:
    with pytest.raises(MatkvError, match="the prompt is empty"):
        generate(*loaded, [], None, None, 4, temperature=0.0, seed=0)
