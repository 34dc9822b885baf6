"""Settings, recipe files and the order of examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lessons import quick, text
from matkv.distill.bases import rank_axes
from matkv.distill.config import DistillConfig
from matkv.distill.examples import TrainingSet
from matkv.distill.stage import distill
from matkv.errors import DataError, TrainingError
from matkv.schedule import Independent
from tiny import Tiny

RECIPES = Path(__file__).parent.parent / "recipes"


def test_every_epoch_meets_every_example_once_in_a_new_order(llama: Tiny) -> None:
    axes = rank_axes(llama.artifact.geometry)
    data = TrainingSet(text(10), Independent(axes), batch_size=5, steps=4, draw="step", seed=0)
    order = [tuple(data[position]["input_ids"].tolist()) for position in range(20)]
    assert sorted(order[:10]) == sorted(order[10:]) == sorted(map(tuple, text(10).tolist()))
    assert order[:10] != order[10:]
    sizes = [tuple(data[position]["sizes"].flatten().tolist()) for position in range(20)]
    assert len(set(sizes)) == 4
    assert sizes[0] == sizes[4] != sizes[5]


def test_an_empty_text_is_refused(llama: Tiny) -> None:
    with pytest.raises(DataError, match="no example"):
        distill(llama.model, llama.artifact, [], quick())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "global"}, "objective 'global' must be one of local"),
        ({"steps": None}, "needs steps, tokens or minutes"),
        ({"lr": 0.0}, "lr 0.0 must be above 0"),
        ({"batch_size": 5, "micro_batch_size": 2}, "multiple of micro_batch_size 2"),
        ({"kl": 0.0}, "one above 0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"lora_rank": -1}, "lora_rank -1 must be 0 or more"),
        ({"recent": -1}, "recent -1 must be 0 or more"),
        ({"adaptive": True}, "adaptive needs a ladder or a cycle, not independent"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        quick(**changes)


def test_the_shorter_of_steps_and_tokens_counts() -> None:
    assert quick(steps=10, tokens=4 * 16 * 7).step_limit == 7
    assert quick(steps=5, tokens=4 * 16 * 7).step_limit == 5
    assert quick(steps=None, minutes=1.0).step_limit is None


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe: Path) -> None:
    config = DistillConfig.from_toml(recipe)
    assert DistillConfig.from_toml(recipe, steps=None, seed=7) == replace(config, seed=7)


def test_a_recipe_that_is_wrong_says_so(tmp_path: Path) -> None:
    for line, message in (
        ("stpes = 3", "unknown setting 'stpes'"),
        ("steps = 3.5", "steps 3.5 must be int"),
        ("steps = true", "steps True must be int"),
        ("steps = ", "cannot read the recipe"),
    ):
        (tmp_path / "recipe.toml").write_text(line)
        with pytest.raises(TrainingError, match=message):
            DistillConfig.from_toml(tmp_path / "recipe.toml")
