"""`matkv allocate`: tiny searches, cut off and resumed, with pictures, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from matkv.allocate.config import AllocateConfig
from matkv.artifact.artifact import Artifact
from matkv.commands.allocate import _search_batches
from matkv.progress import Progress
from program import Program, Word

PNG = b"\x89PNG\r\n\x1a\n"
BUDGETS = ("--budget", "0.5", "--budget", "0.75")


@pytest.fixture
def asked(home: Path, run: Path) -> list[Word]:
    sizes = ["--length", "64", "--search-tokens", "128", "--expansions", "4", "--codes", "16"]
    return ["allocate", run, "--text", home / "text.txt", *sizes]


def interrupt_after(rounds: int, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when the search reports a round."""

    @contextmanager
    def line(label: str) -> Iterator[Callable[[Progress], None]]:
        def update(at: Progress) -> None:
            if at.done == rounds:
                raise KeyboardInterrupt

        yield update

    patch.setattr("matkv.commands.allocate.progress_bar", line)


def state_of(run: Path) -> Path:
    return run.with_name(f".{run.name}.allocate.jsonl")


def test_text_to_search_on_is_drawn_from_all_of_it() -> None:
    """What stands first may be all of one kind; solved tasks follow what is held out."""
    tokenizer: Any = Numbers()
    config = AllocateConfig(search_tokens=16, held_out_tokens=32)
    found = list(_search_batches(tokenizer, ["640"], None, 8, config))
    assert sorted(torch.cat(found).flatten().tolist()) == list(range(640))
    first = torch.cat(found[:8])[:, 0]
    assert first.max() > 320 > first.min()
    solved = list(islice(_search_batches(tokenizer, ["640"], ["5"], 8, config), 3))
    assert [tuple(batch.shape) for batch in solved[:2]] == [(2, 8), (2, 8)]
    assert solved[2].ids_BT.unique().tolist() == [0, 1, 2, 3, 4]


class Numbers:
    """A tokenizer that counts up to what the text says."""

    eos_token_id = pad_token_id = bos_token_id = None

    def __call__(self, text: str | list[str], **_: object) -> BatchEncoding:
        texts = [list(range(int(one))) for one in ([text] if isinstance(text, str) else text)]
        return BatchEncoding({"input_ids": texts[0] if isinstance(text, str) else texts})


@pytest.mark.parametrize("method", ["fisher", "greedy", "uniform"])
def test_tables_of_every_budget_as_json(
    asked: list[Word], run: Path, matkv: Program, method: str
) -> None:
    bases = (run / "bases.safetensors").read_bytes()
    report = matkv(*asked, *BUDGETS, "--method", method, "--json").json()
    made = Artifact.load(run)
    assert sorted(made.tables) == [0.5, 0.75]
    assert made.history[-1]["stage"] == "allocate"
    assert made.history[-1]["method"] == method
    assert made.history[-1]["tables"] == report["tables"]
    assert report["seconds"] == made.history[-1]["seconds"] >= 0
    small, large = report["tables"]
    assert (small["budget"], large["budget"]) == (0.5, 0.75)
    for entry in (small, large):
        table = made.tables[entry["budget"]]
        assert 0.4 < table.budget <= entry["budget"]
        assert entry["key_share"] == pytest.approx(table.share("key"))
        assert entry["value_share"] == pytest.approx(table.share("value"))
        assert all(math.isfinite(entry[name]) for name in ("kl", "perplexity_increase"))
    assert 0 < large["kl"] < small["kl"]
    assert (run / "bases.safetensors").read_bytes() == bases
    assert not state_of(run).exists()


def test_a_picture_and_a_table(
    asked: list[Word], run: Path, tmp_path: Path, matkv: Program
) -> None:
    picture = tmp_path / "ranks.png"
    ended = matkv(*asked, *BUDGETS, "--picture", picture, "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert picture.read_bytes().startswith(PNG)
    assert sorted(Artifact.load(tmp_path / "out").tables) == [0.5, 0.75]
    assert not Artifact.load(run).tables
    lines = ended.out.splitlines()
    assert any("layer" in line and "keys" in line for line in lines)
    for entry in Artifact.load(tmp_path / "out").history[-1]["tables"]:
        row = next(line for line in lines if line.startswith(f"│  {entry['budget']:.1%} "))
        assert f"{entry['kl']:.3f}" in row and f"{entry['uniform_kl']:.3f}" in row


def test_ranks_and_bits_by_default(home: Path, run: Path, tmp_path: Path, matkv: Program) -> None:
    sizes: list[Word] = ["--length", "64", "--search-tokens", "128"]
    sizes += ["--picture", tmp_path / "bits.png"]
    asked: list[Word] = ["allocate", run, "--text", home / "text.txt", *sizes]
    budgets = ["--budget", "0.5", "--budget", "0.25", "--max-kl", "0.05"]
    ended = matkv(*asked, *budgets)
    assert ended.code == 0, ended.err
    assert "bits a column" in ended.out and (tmp_path / "bits.png").read_bytes().startswith(PNG)
    made = Artifact.load(run)
    assert {0.25, 0.5} < set(made.tables) and all(table.coded for table in made.tables.values())
    assert made.bases[0]["key"].quantizer is not None
    page = matkv("inspect", run).out
    assert "bits" in page and "25.0%" in page
    scored = matkv(
        "evaluate", run, "--text", home / "text.txt", "--length", "64", "--tokens", "256"
    )
    assert scored.code == 0, scored.err
    answer = matkv("generate", run, "Who?", "--budget", "0.25", "--max-new-tokens", "4")
    assert answer.code == 0, answer.err
    bad = matkv(*asked, "--codes", "3")
    assert bad.code == 2 and "codes" in bad.err


def test_every_eighth_and_an_error_limit(asked: list[Word], run: Path, matkv: Program) -> None:
    limits = ["--max-kl", "0.02", "--max-perplexity-increase", "400%"]
    report = matkv(*asked, *limits, "--equal-heads", "--json").json()
    eighths = {eighth / 8 for eighth in range(1, 8)}
    tables, entry = Artifact.load(run).tables, Artifact.load(run).history[-1]
    assert (entry["max_kl"], entry["max_perplexity_increase"]) == (0.02, 4.0)
    assert set(tables) == {entry["budget"] for entry in report["tables"]} > eighths
    within = {entry["budget"] for entry in report["tables"] if entry["kl"] <= 0.02}
    assert min(within) not in eighths  # the smallest cache within the limit
    for table in tables.values():
        assert all(len(set(ranks)) == 1 for ranks in (*table.key, *table.value))


def test_a_search_on_solved_tasks(asked: list[Word], home: Path, run: Path, matkv: Program) -> None:
    asked = [*asked, "--budget", "0.5", "--json"]
    tasks: list[Word] = ["--tasks", "letters,contexts", "--tasks-dir", home / "data"]
    (on_text,) = matkv(*asked).json()["tables"]
    of_text = Artifact.load(run).tables
    (on_tasks,) = matkv(*asked, *tasks).json()["tables"]
    assert Artifact.load(run).tables != of_text
    assert on_tasks["uniform_kl"] == on_text["uniform_kl"]  # verified on the same text
    assert math.isfinite(on_tasks["kl"])


@pytest.mark.parametrize(("method", "lowest"), [("fisher", 0.25), ("greedy", 0.75)])
def test_a_search_cut_off_goes_on_to_the_same_tables(
    asked: list[Word], run: Path, tmp_path: Path, matkv: Program, method: str, lowest: float
) -> None:
    asked = [*asked, "--budget", "0.875", "--budget", str(lowest), "--method", method]
    whole = tmp_path / "whole"
    assert matkv(*asked, "-o", whole).code == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        ended = matkv(*asked)
    assert ended.code == 130
    assert "interrupted" in ended.err and "run again to go on" in ended.err and not ended.out
    half = Artifact.load(run)
    assert half.history[-1]["interrupted"]
    assert min(half.tables) > min(Artifact.load(whole).tables)
    assert len(state_of(run).read_text().splitlines()) == 2  # its digest and one round

    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        follow(seen, patch)
        report = matkv(*asked, "--json").json()
    assert seen[0] == 2  # the first round was not searched again
    made, expected = Artifact.load(run), Artifact.load(whole)
    assert made.tables == expected.tables
    assert not made.history[-1]["interrupted"]
    assert report["tables"] == expected.history[-1]["tables"]
    assert not state_of(run).exists()


def follow(seen: list[int], patch: pytest.MonkeyPatch) -> None:
    """Note the rounds that the search reports."""

    @contextmanager
    def line(label: str) -> Iterator[Callable[[Progress], None]]:
        yield lambda at: seen.append(at.done)

    patch.setattr("matkv.commands.allocate.progress_bar", line)


def test_the_state_of_another_search_is_refused(
    asked: list[Word], run: Path, matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert matkv(*asked, *BUDGETS).code == 130
    config = json.loads((run / "config.json").read_text())
    message = matkv(*asked, *BUDGETS, "--equal-sides").refusal()
    assert "belongs to a search with other settings" in message
    assert json.loads((run / "config.json").read_text()) == config
    assert state_of(run).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "x"], "method 'x' must be one of fisher, greedy, uniform"),
        (["--budget", "0"], "budget 0.0 must be in (0, 1]"),
        (["--max-kl", "0"], "max_kl 0.0 must be above 0"),
        (["--max-perplexity-increase", "much"], "'much' must be a percentage, as 5%"),
        (
            ["--max-perplexity-increase", "nan"],
            "max_perplexity_increase nan must be a finite number",
        ),
        (["--protect", "9"], "9"),
        (["--length", "100000"], "fewer than"),
        (["-o", "{tmp}"], "is not an artifact"),
        (["--tasks", "none", "--tasks-dir", "{tmp}"], "holds no .jsonl file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    asked: list[Word],
    run: Path,
    tmp_path: Path,
    matkv: Program,
    options: list[str],
    message: str,
) -> None:
    given = [option.format(tmp=tmp_path) for option in options]
    assert message in matkv(*asked, *given).refusal()
    assert not Artifact.load(run).tables


def test_a_run_one_stands_in(
    asked: list[Word], run: Path, matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked[1] = "."
    monkeypatch.chdir(run)
    ended = matkv(*asked, *BUDGETS, "--picture", "ranks.png")
    assert ended.code == 0, ended.err
    assert (run / "ranks.png").read_bytes().startswith(PNG)
    assert set(Artifact.load(run).tables) == {0.5, 0.75}
