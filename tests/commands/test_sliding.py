"""Layers that stay as they are: every command that names a budget says what the whole cache is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import matkv as package
from matkv.artifact.artifact import Artifact
from matkv.models.load import load_model
from matkv.ranks import RankTable
from matkv.report.runs import read_runs
from matkv.report.sections.headline import headline
from program import Program, Word
from tiny import save_model, tokens

STAYS = "2 of 4 layers have a sliding window and stay as they are"
LENGTHS = (1024, 32768)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with sliding layers, an artifact of it with one table, and a text."""
    home = tmp_path_factory.mktemp("sliding")
    save_model(home / "model", family="gemma3")
    model, _ = load_model(str(home / "model"))
    artifact = package.calibrate(model, [tokens(4, 48)])
    table = RankTable.uniform(artifact.geometry, 0.25)
    replace(artifact, tables={0.25: table}, recent=4).save(home / "run")
    (home / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return home


@pytest.fixture
def shares(home: Path) -> list[str]:
    """Of all bytes at both lengths, by hand: windows of 8 tokens, 4 of the others exact."""
    found = []
    for length in LENGTHS:
        stays, exact, kept = 7, 4, (length - 4) / 4
        found.append(f"{(stays + exact + kept) / (stays + length):.1%}")
    return found


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Iterator[Path]:
    Artifact.load(home / "run").save(tmp_path / "run")
    yield tmp_path / "run"


def said(page: str) -> str:
    return " ".join(page.split())


def test_inspect_says_it_of_every_table(run: Path, matkv: Program, shares: list[str]) -> None:
    page = said(matkv("inspect", run).out)
    held = matkv("inspect", run, "--json").json()["held"]["0.25"]
    assert [f"{held[str(length)]:.1%}" for length in LENGTHS] == shares
    assert STAYS in page
    assert " / ".join(f"{held[str(length)]:.0%}" for length in LENGTHS) in page


def test_allocate_says_it_of_every_table(run: Path, home: Path, matkv: Program) -> None:
    sizes: list[Word] = ["--length", "64", "--search-tokens", "64", "--held-out-tokens", "64"]
    few: list[Word] = [
        *sizes,
        "--expansions",
        "2",
        "--budget",
        "0.5",
        "--method",
        "uniform",
        "--codes",
        "16",
    ]
    asked: list[Word] = ["allocate", run, "--text", home / "text.txt", *few]
    page = said(matkv(*asked).out)
    held = matkv(*asked, "--json").json()["held"]["0.5"]
    assert STAYS in page and f" {held['1024']:.0%} / " in page
    assert 0.5 < held["32768"] < held["1024"] < 0.51


def test_evaluate_says_it_beside_the_perplexity(
    run: Path, home: Path, matkv: Program, shares: list[str]
) -> None:
    asked: list[Word] = [
        "evaluate",
        run,
        "--text",
        home / "text.txt",
        "--length",
        "32",
        "--tokens",
        "64",
    ]
    ended = matkv(*asked)
    assert STAYS in said(ended.out)
    assert f"25.0% is {shares[0]} and {shares[1]}" in said(ended.out)
    full, row = matkv(*asked, "--json").json()["rows"]
    assert row["kept"] == 0.25 and full["held"] == 1
    assert row["held"] == (7 + 4 + 28 / 4) / (7 + 32)
    assert f"{row['held']:.1%}" in ended.out
    by_position = matkv(*asked, "--by-position").out
    assert STAYS in said(by_position) and shares[0] in by_position
    notes = headline(read_runs([run])).notes
    assert any(STAYS in note and shares[0] in note for note in notes)
    assert f"of the bytes that grow, {row['held']:.1%} of the whole cache's" in (
        headline(read_runs([run])).sentence
    )


def test_benchmark_and_chat_say_it(
    run: Path, matkv: Program, shares: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few: list[Word] = ["--context", "20", "--budget", "0.25", "--steps", "1"]
    page = said(matkv("benchmark", run, *few).out)
    assert STAYS in page and shares[0] in page
    assert f"{(7 + 4 + 16 / 4) / (7 + 20):.1%}" in page
    monkeypatch.setattr("matkv.commands.chat._messages", lambda: iter(["/quit"]))
    ended = matkv("chat", run, "--budget", "0.25")
    assert STAYS in said(ended.out + ended.err) and shares[0] in ended.out + ended.err


def test_a_whole_cache_that_grows_needs_no_word(matkv: Program, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    model, _ = load_model(str(tmp_path / "model"))
    artifact = package.calibrate(model, [tokens(2, 32)])
    table = RankTable.uniform(artifact.geometry, 0.5)
    replace(artifact, tables={0.5: table}).save(tmp_path / "run")
    page = matkv("inspect", tmp_path / "run").out
    assert "sliding" not in page and "50.0%" in page
