"""`matkv evaluate` with tasks, with texts and with both, in a directory of its own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from matkv import cli
from matkv.artifact import results
from matkv.artifact.artifact import Artifact
from matkv.commands.evaluate import BUDGETS
from matkv.data import task_items
from matkv.ranks import RankTable
from quiz import make_run, write_tasks

SCHEMA = {
    "acc",
    "acc_norm",
    "acc_norm_stderr",
    "budget",
    "difference",
    "difference_stderr",
    "n",
    "retention",
    "retention_above_chance",
    "stderr",
    "task",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("evaluate")
    make_run(home)
    write_tasks(home / "data")
    (home / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    return home


class Command:
    """`matkv evaluate` on a fresh copy of the run."""

    def __init__(self, home: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.run, self.capsys = home, run, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        names = {"data": self.home / "data", "text": self.home / "text.txt", "run": self.run}
        given = ["matkv", "evaluate", str(self.run), *(one.format(**names) for one in arguments)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", given)
            patch.setenv("COLUMNS", "200")
            code: Any = 0
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code or 0
        captured = self.capsys.readouterr()
        return int(code), captured.out, captured.err

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        rows: list[dict[str, Any]] = json.loads(out)["rows"]
        return rows


@pytest.fixture
def command(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    return Command(home, run, capsys)


TASKS = ("--tasks", "letters,contexts", "--tasks-dir", "{data}")
TEXT = ("--text", "{text}", "--length", "32")


def test_rows_of_tasks_as_json(command: Command) -> None:
    rows = command.rows(*TASKS, "--budget", "0.5", "--limit", "6")
    assert [(row["budget"], row["task"]) for row in rows] == [
        (None, "letters"),
        (None, "contexts"),
        (0.5, "letters"),
        (0.5, "contexts"),
        (None, "average"),
        (0.5, "average"),
    ]
    assert all(set(row) >= SCHEMA for row in rows)
    assert [row["n"] for row in rows] == [6, 6, 6, 6, 12, 12]
    assert not any("correct" in row for row in rows)
    assert all(row["retention"] == 1 for row in rows if row["budget"] is None)
    kept = results.load_rows(command.run, "tasks")
    assert len(kept) == 4
    assert set(kept[0]["correct"]) <= {"0", "1"}


def test_a_table_as_papers_have_it(command: Command) -> None:
    code, out, err = command(*TASKS, "--budget", "0.5", "--budget", "0.25")
    assert code == 0, err
    for words in ("letters", "contexts", "average", "retention", "full cache", "25.0%", "±"):
        assert words in out
    assert "perplexity" not in out


def test_texts_and_tasks_in_one_call(command: Command) -> None:
    rows = command.rows(*TASKS, *TEXT, "--budget", "0.5")
    texts = [row for row in rows if "perplexity" in row]
    assert [row["budget"] for row in texts] == [None, 0.5]
    assert len(rows) == 2 + 4 + 2
    kept = results.load_rows(command.run, "perplexity")
    assert [row["budget"] for row in kept] == [None, 0.5]
    half = kept[1]
    assert half["text"] == "text.txt"
    assert half["window_tokens"] == 32
    assert half["ranks"] and half["artifact"] and half["made"]["command"]
    assert {"uniform", "kept", "stderr", "bytes_per_token", "tokens", "sink", "recent"} <= set(half)


def test_perplexity_is_kept_until_something_changes(command: Command) -> None:
    budgets = ("--budget", "0.5", "--budget", "0.25")
    first = command.rows(*TEXT, *budgets)
    assert command.rows(*TEXT, *budgets) == first  # `seconds` too: it was not measured anew
    assert command.rows(*TEXT, *budgets, "--again")[0]["perplexity"] == first[0]["perplexity"]
    assert command.rows(*TEXT, *budgets, "--sink", "2")[1]["perplexity"] != first[1]["perplexity"]
    assert len(results.load_rows(command.run, "perplexity")) == 5


def test_divergence_alone_and_with_perplexities(command: Command) -> None:
    (row,) = command.rows(*TEXT, "--budget", "0.5", "--divergence")
    assert row["kl"] > 0
    assert 0 <= row["same"] <= 1
    assert "perplexity" not in row
    code, out, err = command(*TEXT, "--budget", "0.5", "--divergence", "--by-position")
    assert code == 0, err
    assert "same next token" in out
    assert "0-31" in out


def test_budgets_come_from_the_artifact_unless_given(command: Command) -> None:
    assert {row["budget"] for row in command.rows(*TASKS, "--limit", "2")} == {
        None,
        *BUDGETS,
    }
    artifact = Artifact.load(command.run)
    artifact.tables[0.4] = RankTable.uniform_sides(artifact.geometry, 0.3, 0.5)
    artifact.save(command.run)
    budgets = [row["budget"] for row in command.rows(*TASKS, "--limit", "2")]
    assert list(dict.fromkeys(budgets)) == [None, 0.4]


BAD = {
    "unknown task": ((*TASKS[:1], "piqa", *TASKS[2:]), "no task 'piqa' in"),
    "no folder": (("--tasks", "a", "--tasks-dir", "{run}/none"), "is no directory"),
    "no name": (("--tasks", ",", "--tasks-dir", "{data}"), "no task is named"),
    "limit 0": ((*TASKS, "--limit", "0"), "limit 0 must be above 0"),
    "batch size 0": ((*TASKS, "--batch-size", "0"), "batch_size 0 must be above 0"),
    "limit alone": (("--limit", "5"), "--limit 5 needs --tasks"),
    "folder alone": (("--tasks-dir", "{data}"), "needs --tasks"),
    "bad budget": ((*TASKS, "--budget", "2"), "budget 2.0 must be in (0, 1]"),
    "bad line": (("--tasks", "bad", "--tasks-dir", "{run}"), "bad.jsonl, line 1: not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(command: Command, case: str) -> None:
    (command.run / "bad.jsonl").write_text("{")
    arguments, message = BAD[case]
    code, _, err = command(*arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1


def test_a_missing_lm_eval_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_items, "find_spec", lambda _: None)
    code, _, err = command(*TASKS)
    assert code == 2
    assert "pip install lm-eval datasets" in err


def test_damaged_results_are_named(command: Command) -> None:
    (command.run / "results").mkdir()
    (command.run / "results" / "tasks.json").write_text("{")
    code, _, err = command(*TASKS, "--budget", "0.5")
    assert code == 2
    assert "tasks.json is damaged" in " ".join(err.split())
