"""`matkv generate`: an answer, what its cache took, and at which ranks it really ran."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import matkv as package
from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Distilled
from matkv.commands.tables import bytes_text
from matkv.ranks import RankTable
from matkv.schedule import Axis, Ladder
from program import Program, Word

TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # of the full cache


def test_it_answers_and_counts_bytes(run: Path, matkv: Program) -> None:
    asked: list[Word] = ["generate", run, "hello", "--max-new-tokens", 4]
    answer = matkv(*asked, "--json").json()
    assert 1 <= answer["tokens"] <= 4
    held = answer["tokens_held"]
    assert answer["full_bytes"] == held * TOKEN_BYTES == 2 * answer["cache_bytes"]
    ended = matkv(*asked)
    assert ended.out.strip() == answer["text"].strip()
    said = f"{held:,} tokens: cache of {bytes_text(answer['cache_bytes'])}, 50.0% of the full"
    assert said in ended.err


def test_exact_tokens_are_counted(run: Path, matkv: Program) -> None:
    asked: list[Word] = ["generate", run, "hello", "--max-new-tokens", 4, "--json"]
    plain = matkv(*asked, "--temperature", 0).json()
    exact = matkv(*asked, "--sink", 2, "--recent", 3).json()
    extra = 5 * TOKEN_BYTES // 2
    assert exact["cache_bytes"] - exact["tokens_held"] * TOKEN_BYTES // 2 == extra
    assert plain["cache_bytes"] == plain["tokens_held"] * TOKEN_BYTES // 2


def test_special_tokens_are_not_printed(
    run: Path, matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = package.load_model(Artifact.load(run).base_model)

    def ends(model: Any, *args: Any, streamer: Any, input_ids: Any, **how: Any) -> Any:
        said = torch.tensor([*tokenizer("hi").input_ids, tokenizer.eos_token_id])
        for part in (input_ids, *said[:, None]):
            streamer.put(part)
        streamer.end()
        return torch.cat((input_ids[0], said))[None]

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", ends)
    ended = matkv("generate", run, "hello")
    assert ended.code == 0, ended.err
    assert ended.out.strip() == "hi"


def test_the_ranks_it_ran_at_are_said_beside_those_asked_for(run: Path, matkv: Program) -> None:
    artifact = Artifact.load(run)
    half = RankTable.uniform(artifact.geometry, 0.5)
    replace(artifact, tables={0.5: half}).save(run)
    asked: list[Word] = ["generate", run, "hi", "--max-new-tokens", 2, "--json"]
    answer = matkv(*asked, "--budget", 0.6).json()
    assert (answer["budget"], answer["kept"]) == (0.6, 0.5)
    answer = matkv(*asked, "--budget", 0.75, "--uniform").json()
    assert (answer["budget"], answer["kept"]) == (0.75, 0.75)


@pytest.mark.parametrize(("budget", "warns"), [(0.25, True), (0.5, False), (1.0, False)])
def test_ranks_that_no_training_drew_are_said(
    run: Path, matkv: Program, budget: float, warns: bool
) -> None:
    artifact = Artifact.load(run)
    axes = tuple(Axis(f"axis {i}", 8, 1) for i in range(8))
    schedule = Ladder(axes, ((4,) * 8, (8,) * 8))
    artifact.with_history(Distilled(schedule=schedule)).save(run)
    ended = matkv("generate", run, "hi", "--max-new-tokens", 2, "--budget", budget)
    assert ended.code == 0, ended.err
    said = "trained at ranks of 4 and more, and 8 of 8 ranks at 25.0% are smaller"
    assert (said in " ".join(ended.err.split())) is warns


def test_a_prompt_beyond_the_positions_is_refused(run: Path, matkv: Program) -> None:
    ended = matkv("generate", run, "far too long " * 300)
    assert "positions, the model has 2048" in ended.refusal()


def test_a_model_without_a_name_has_to_be_named(run: Path, home: Path, matkv: Program) -> None:
    replace(Artifact.load(run), base_model="").save(run)
    asked: list[Word] = ["generate", run, "hello", "--max-new-tokens", 2]
    assert "a model without a name: say where it is with --model" in matkv(*asked).refusal()
    assert matkv(*asked, "--model", home / "model").code == 0


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_bytes_that_are_no_utf8_are_refused(run: Path, matkv: Program, raw: list[str]) -> None:
    """As Python hands them on from a command line."""
    assert "is not UTF-8" in matkv("generate", run, "caf\udce9", *raw).refusal()
