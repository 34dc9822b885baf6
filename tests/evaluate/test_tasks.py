"""Rows of tasks and budgets: what they hold, and that nothing is measured twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import matkv
from matkv.artifact import results
from matkv.artifact.artifact import Artifact
from matkv.artifact.lora import WRAPPER, Lora
from matkv.artifact.records import Record
from matkv.artifact.results import Results
from matkv.artifact.setting import Setting
from matkv.data.task_items import load_tasks
from matkv.errors import BudgetError, DataError
from matkv.evaluate.lm_eval_model import LoadedLM
from matkv.evaluate.scores import accuracy
from matkv.evaluate.tasks import TASKS, TaskConfig, score_tasks
from matkv.hf.attach import attachment_of
from matkv.progress import Progress
from matkv.ranks import RankTable
from quiz import make_run, write_tasks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Artifact]:
    return make_run(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def artifact(made: tuple[Any, Any, Artifact]) -> Artifact:
    return made[2]


class Scorer:
    """`score_tasks` on the tiny model, counting the requests it really makes."""

    def __init__(self, made: tuple[Any, Any, Artifact], folder: Path, run: Path) -> None:
        self.model, self.tokenizer, self.artifact = made
        self.folder, self.run = folder, run
        self.seen: list[Progress] = []

    def __call__(
        self,
        *budgets: float | None,
        tasks: tuple[str, ...] = ("letters", "contexts"),
        artifact: Artifact | None = None,
        again: bool = False,
        **settings: Any,
    ) -> list[Record]:
        self.seen.clear()
        names = {"uniform", "sink", "recent"} & set(settings)
        way = {name: settings.pop(name) for name in names}
        return score_tasks(
            self.model,
            self.tokenizer,
            artifact or self.artifact,
            load_tasks(tasks, self.folder),
            [Setting(budget=budget, **way) for budget in budgets],
            TaskConfig(**settings),
            Results(self.run, TASKS, again=again),
            on_progress=self.seen.append,
        )

    @property
    def measured(self) -> list[tuple[float | None, str]]:
        """Budget and task of what was reported."""
        notes = dict.fromkeys(tuple(at.note.split(" · ")) for at in self.seen)
        return [
            (None if name == "full cache" else float(name[:-1]) / 100, task) for task, name in notes
        ]


@pytest.fixture
def score(made: tuple[Any, Any, Artifact], tmp_path: Path) -> Iterator[Scorer]:
    yield Scorer(made, write_tasks(tmp_path / "data"), tmp_path / "run")
    matkv.detach(made[0])


def test_rows_say_what_was_measured_and_how(score: Scorer, artifact: Artifact) -> None:
    rows = score(None, 0.5)
    assert [(row["budget"], row["task"]) for row in rows] == [
        (None, "letters"),
        (None, "contexts"),
        (0.5, "letters"),
        (0.5, "contexts"),
    ]
    full, _, half, last = rows
    assert full["ranks"] is full["sink"] is full["recent"] is None
    assert half["artifact"] == full["artifact"] == artifact.digest
    assert half["ranks"] == RankTable.uniform(artifact.geometry, 0.5).digest
    assert (half["sink"], half["recent"], half["uniform"]) == (0, 0, False)
    assert half["dtype"] == "float32"
    assert half["made"]["seed"] == 0
    assert half["made"]["lm_eval"]
    assert half["n"] == len(half["correct"]) == len(half["correct_norm"]) == 10
    assert (half["acc"], half["stderr"]) == accuracy(half["correct"])
    assert (half["acc_norm"], half["acc_norm_stderr"]) == accuracy(half["correct_norm"])
    assert half["chance"] == pytest.approx((4 / 2 + 3 / 3 + 3 / 4) / 10)
    assert last["chance"] == 0.5
    assert last["acc_norm"] == last["acc"]  # one continuation has one length
    assert results.load_rows(score.run, "tasks") == rows
    assert attachment_of(score.model) is None


def test_progress_counts_requests(score: Scorer) -> None:
    score(0.5, tasks=("contexts",), batch_size=4)
    assert [(at.done, at.total) for at in score.seen] == [(4, 16), (8, 16), (12, 16), (16, 16)]


def test_nothing_is_measured_twice_unless_asked(score: Scorer) -> None:
    first = score(None, 0.5, limit=4)
    assert score(None, 0.5, limit=4) == first
    assert score.measured == []
    assert score(None, 0.5, limit=4, again=True)[0]["correct"] == first[0]["correct"]
    assert len(score.measured) == 4
    assert len(results.load_rows(score.run, "tasks")) == 4


def test_what_changes_an_answer_is_measured_again(score: Scorer, artifact: Artifact) -> None:
    def missing(**changes: Any) -> int:
        score(0.5, tasks=("letters",), **changes)
        return len(score.measured)

    assert missing(limit=4) == 1
    assert missing(limit=4, seed=1) == 1
    assert missing() == 1
    assert missing(sink=1) == 1
    assert missing(recent=2) == 1
    skewed = replace(artifact, tables={0.5: RankTable.uniform_sides(artifact.geometry, 0.25, 0.75)})
    assert missing(artifact=skewed) == 1
    assert missing(artifact=skewed, uniform=True) == 0  # the ranks of before the search
    other = matkv.calibrate(score.model, [torch.arange(64)[None]])
    assert missing(artifact=other) == 1
    path = score.folder / "letters.jsonl"
    path.write_text(path.read_text().replace("yes", "no"))
    assert missing() == 1
    assert missing() == 0


def test_a_run_cut_short_goes_on_where_it_was(
    score: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = LoadedLM._loglikelihood_tokens
    calls = []

    def cut(self: LoadedLM, *inputs: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, *inputs, **options)

    monkeypatch.setattr(LoadedLM, "_loglikelihood_tokens", cut)
    with pytest.raises(KeyboardInterrupt):
        score(None, 0.5)
    assert len(results.load_rows(score.run, "tasks")) == 2
    assert attachment_of(score.model) is None
    monkeypatch.undo()
    assert len(score(None, 0.5)) == 4
    assert score.measured == [(0.5, "letters"), (0.5, "contexts")]


def test_every_budget_gets_the_same_items(score: Scorer) -> None:
    asked: list[list[str]] = []
    ask = LoadedLM.loglikelihood

    def spy(self: LoadedLM, requests: list[Any], disable_tqdm: bool = False) -> Any:
        asked.append([request.args[0] for request in requests])
        return ask(self, requests, disable_tqdm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedLM, "loglikelihood", spy)
        rows = score(None, 1.0, 0.25, tasks=("letters",), limit=5, seed=3)
    assert asked[0] == asked[1] == asked[2]
    assert len(dict.fromkeys(asked[0])) == 5
    assert [row["n"] for row in rows] == [5, 5, 5]
    assert rows[0]["correct"] == rows[1]["correct"]  # full rank changes nothing


def test_the_full_cache_is_the_plain_model_without_adapters(
    score: Scorer, artifact: Artifact
) -> None:
    """Adapters are the artifact's: at budget 1 they take part, in the full cache they do not."""
    name = "model.layers.0.self_attn.q_proj"
    weight = score.model.get_parameter(f"{name}.weight")
    before = weight.detach().clone()
    seen = []

    def spy(self: LoadedLM, *inputs: Any, **options: Any) -> Any:
        seen.append(torch.equal(weight, before))
        return answer(self, *inputs, **options)

    answer = LoadedLM._loglikelihood_tokens
    tensors = {
        f"{WRAPPER}{name}.lora_A.weight": torch.ones(1, weight.shape[1]),
        f"{WRAPPER}{name}.lora_B.weight": torch.ones(weight.shape[0], 1),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedLM, "_loglikelihood_tokens", spy)
        adapted = replace(artifact, lora=Lora({"r": 1, "lora_alpha": 1}, tensors))
        score(None, 1.0, tasks=("letters",), artifact=adapted)
    assert seen == [True, False]
    assert torch.equal(weight, before)


def test_bad_settings_are_refused_before_any_work(score: Scorer) -> None:
    with pytest.raises(DataError, match="limit 0 must be above 0"):
        score(None, limit=0)
    with pytest.raises(BudgetError, match=r"budget 1\.5"):
        score(None, 1.5)
    assert score.seen == []
