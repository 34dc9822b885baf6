"""`matkv serve`: the command it runs, what it says fits, and what it refuses first."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bad_values import assert_refused
from matkv.artifact.artifact import Artifact
from matkv.commands import serve
from matkv.ranks import RankTable
from one_artifact import adapters
from program import Program
from tiny import build, save_model


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run in this process's place, on a machine with vLLM."""
    commands: list[list[str]] = []

    def execute(program: str, command: list[str]) -> None:
        assert program == sys.executable
        commands.append(command)

    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    monkeypatch.setattr(serve, "_installed", lambda: "0.32.0")
    return commands


def after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_the_whole_command_is_printed_and_run(
    matkv: Program, run: Path, started: list[list[str]]
) -> None:
    ended = matkv("serve", run, "--budget", "0.25", "--port", "8001", "--max-model-len=64")
    assert ended.code == 0, ended.err
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert after(command, "--attention-backend") == "CUSTOM"
    artifact = Artifact.load(run)
    assert after(command, "--model") == artifact.base_model
    options = json.loads(after(command, "--additional-config"))
    assert options == {"matkv": {"artifact": str(run.resolve()), "budget": 0.25}}
    assert command[-3:] == ["--port", "8001", "--max-model-len=64"]
    assert shlex.split(ended.out.splitlines()[0]) == command


def test_what_fits_is_counted_by_the_table(
    matkv: Program, run: Path, started: list[list[str]]
) -> None:
    ended = matkv("serve", run, "--budget", "0.5", "--dry-run", "--dtype", "float32",
                  "--kv-cache-memory-bytes", "1MiB", "--served-model-name", "mine")  # fmt: skip
    assert ended.code == 0 and not started, ended.err
    table = Artifact.load(run).table(0.5)
    for one in (RankTable.full(table.geometry), table):
        assert f"{2**20 // one.bytes_per_token(torch.float32):,}" in ended.out
    assert "--served-model-name mine" in ended.out and "exact tokens" not in ended.out


def test_exact_tokens_are_passed_on_and_what_they_take_is_told(
    matkv: Program, run: Path, started: list[list[str]]
) -> None:
    ended = matkv("serve", run, "--budget", "0.5", "--sink", "4", "--recent", "8")
    assert ended.code == 0, ended.err
    options = json.loads(after(started[0], "--additional-config"))["matkv"]
    assert (options["sink"], options["recent"]) == (4, 8)
    assert "12 exact tokens take as much as" in ended.out and "24 tokens" in ended.out


def test_an_artifact_is_asked_what_it_needs(
    matkv: Program, run: Path, tmp_path: Path, started: list[list[str]]
) -> None:
    """Small pages for exact tokens, and a loader that adds adapters; what is given stays."""
    artifact = replace(Artifact.load(run), sink=4, recent=8, lora=adapters())
    artifact.save(tmp_path / "own")
    assert matkv("serve", tmp_path / "own").code == 0
    assert matkv("serve", tmp_path / "own", "--block-size", "32").code == 0
    assert matkv("serve", tmp_path / "own", "--sink", "0", "--recent", "0").code == 0
    assert [after(one, "--load-format") for one in started] == ["matkv"] * 3
    assert [after(one, "--block-size") for one in started[:2]] == ["16", "32"]
    assert "--block-size" not in started[2]
    ended = matkv("serve", tmp_path / "own", "--load-format", "safetensors")
    assert_refused(ended)
    assert "use --load-format matkv" in ended.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--budget", "2"), "budget 2.0 must be in"),
        (("--sink", "-4"), "-4"),
        (("--model", "/none"), "/none"),
        (("--kv-cache-memory-bytes", "much"), "'much'"),
    ],
)
def test_what_cannot_be_served_is_refused(
    matkv: Program, run: Path, words: tuple[str, ...], told: str, started: list[list[str]]
) -> None:
    ended = matkv("serve", run, *words)
    assert_refused(ended)
    assert told in ended.err and not started


def test_another_model_is_refused(matkv: Program, run: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", seed=5)
    ended = matkv("serve", run, "--model", tmp_path / "other", "--dry-run")
    assert_refused(ended)
    assert "weights differ" in ended.err


def test_a_model_with_sliding_windows_is_refused(matkv: Program, run: Path, tmp_path: Path) -> None:
    build("gemma3").save_pretrained(tmp_path / "gemma3")
    ended = matkv("serve", run, "--model", tmp_path / "gemma3", "--dry-run")
    assert_refused(ended)
    assert "sliding window of 8 tokens" in ended.err


def test_a_missing_vllm_is_told_with_the_remedy(
    matkv: Program, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    ended = matkv("serve", run)
    assert_refused(ended)
    assert "pip install" in ended.err
