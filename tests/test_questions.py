"""The paper's questions: every arm is the recipe but for its change, is kept, and is printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import questions
from matkv import calibrate, data
from matkv.allocate.config import AllocateConfig
from matkv.allocate.stage import allocate
from matkv.artifact.artifact import Artifact
from matkv.artifact.results import Results
from matkv.calibrate import CalibrateConfig
from matkv.distill.config import DistillConfig
from matkv.ranks import RankTable
from matkv.settings import find_recipe
from tiny import Tiny, tokens

BUDGETS = (0.5, 0.25)


@pytest.fixture
def desk(llama: Tiny, tmp_path: Path) -> questions.Desk:
    train_NT = tokens(16, 24, seed=3)
    fresh = calibrate(llama.model, [train_NT[:4]], CalibrateConfig(sink=1, recent=2))
    config = AllocateConfig(
        budgets=(*BUDGETS, 0.75), expansions=2, held_out_tokens=24, search_tokens=24
    )
    start = allocate(llama.model, fresh, [ids_T[None] for ids_T in train_NT], config)
    return questions.Desk(
        model=llama.model, start=start, train_NT=train_NT, scored_NT=tokens(3, 24, seed=9),
        budgets=BUDGETS, folder=tmp_path, steps=4, length=24, batch=2,
    )  # fmt: skip


def few_arms() -> list[questions.Arm]:
    return [
        questions.Arm("recipe", "as it is", {"recent": 2}),
        questions.Arm("free", "free, lr 1", {"parametrization": "free", "recent": 2}),
        questions.Arm("schedule", "ladder", {"schedule": "ladder", "recent": 2}, passes=2),
    ]


def options(*given: str) -> Any:
    return questions.parse(given)


def test_every_arm_is_the_recipe_but_for_its_change(desk: questions.Desk) -> None:
    recipe = DistillConfig.from_toml(find_recipe(questions.RECIPE)).to_json()
    sizes = {"sequence_length", "batch_size", "micro_batch_size", "steps", "minutes", "seed"}
    sizes |= {"probe_every", "warmup_steps"}
    given = replace(desk, budgets=tuple(recipe["rungs"]))
    for arm in questions.arms():
        found = given.config(arm, 3).to_json()
        changed = {name for name in found if found[name] != recipe[name]} - sizes
        assert changed <= set(arm.settings), arm.name
        assert given.config(arm, 3).steps == max(1, 4 // arm.passes)
    names = [f"{arm.question}: {arm.name}" for arm in questions.arms()]
    assert len(set(names)) == len(names)


def test_arms_are_kept_and_not_run_again(
    desk: questions.Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(questions, "desk", lambda options: desk)
    monkeypatch.setattr(questions, "arms", few_arms)
    desk.start.save(desk.folder / "trained")
    asked = ["-o", str(desk.folder), "--shares-of", str(desk.folder / "trained"), "--split", "0.5"]
    questions.main(asked)
    page = capsys.readouterr().out
    assert "| free | free, lr 1 |" in page
    assert "for the keys" in page
    assert "| tokens | loss at 0.5 |" in page
    monkeypatch.setattr(questions.Desk, "trained", lambda *_: pytest.fail("run again"))
    questions.main(asked)
    again = capsys.readouterr().out
    assert again == page[page.index("| question |") :]
    questions.main([*asked, "--table"])
    assert capsys.readouterr().out == again
    assert not list((desk.folder / "checkpoints").iterdir())


def test_only_what_is_named_runs(desk: questions.Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "desk", lambda options: desk)
    monkeypatch.setattr(questions, "arms", few_arms)
    questions.main(["-o", str(desk.folder), "--only", "ladder"])
    rows = Results(None, questions.ARMS, file=desk.folder / "questions.json").rows
    assert [row["arm"] for row in rows] == ["schedule: ladder"]
    assert rows[0]["0.5"][0] > 0


def test_a_side_takes_what_the_other_gives(desk: questions.Desk) -> None:
    less, more = (questions.split_table(desk.start, 0.5, share) for share in (0.5, 0.75))
    assert more.share("key") > less.share("key")
    assert more.share("value") < less.share("value")
    same = questions.split_table(desk.start, 0.5, 0.5)
    assert isinstance(same, RankTable)


def test_seeds_are_averaged_and_their_spread_is_told() -> None:
    rows = [
        {"question": "free", "arm": "free: one", "steps": 8, "seed": seed, "0.5": [kl, 0.3]}
        for seed, kl in enumerate((1.0, 2.0, 3.0))
    ]
    page = questions.table(rows)
    assert "| free | one | 2.0000 ± 0.5774 | 8 | 3 |" in page
    assert "1.0000 ± 0.3000" in questions.table(rows[:1])


def test_windows_are_taken_all_over_a_text() -> None:
    windows_NT = torch.arange(20)[:, None]
    assert questions.spread_out(windows_NT, 4).flatten().tolist() == [0, 5, 10, 15]
    assert len(questions.spread_out(windows_NT[:3], 8)) == 3


def test_the_start_is_made_once(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, desk: questions.Desk
) -> None:
    made: list[int] = []

    def make(*_: Any) -> Artifact:
        made.append(1)
        return desk.start

    monkeypatch.setattr(questions, "load_model", lambda *_: (llama.model, None))
    monkeypatch.setattr(data, "read_texts", lambda *_: [""])
    monkeypatch.setattr(data, "text_windows", lambda *_: tokens(9, 24))
    monkeypatch.setattr(questions, "make_start", make)
    for _ in range(2):
        found = questions.desk(options("-o", str(tmp_path / "out"), "--scored", "3"))
        assert found.start.digest == desk.start.digest
        assert len(found.scored_NT) == 3
    assert made == [1]
