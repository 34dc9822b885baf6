"""Recipes by name or by path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from matkv.distill.config import DistillConfig
from matkv.errors import TrainingError
from matkv.settings import find_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_valid_by_its_name(name: str) -> None:
    config = DistillConfig.from_toml(name)
    assert config == DistillConfig.from_toml(find_recipe(name))
    assert DistillConfig.from_toml(name, steps=None, seed=7) == replace(config, seed=7)


def test_the_package_has_a_recipe_for_each_place_to_run() -> None:
    assert {"default-cpu", "default-gpu", "llama2-7b"} <= set(recipe_names())


def test_a_file_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = Path("default-cpu")
    own.write_text("steps = 3")
    assert find_recipe("default-cpu") == own
    assert DistillConfig.from_toml("default-cpu").steps == 3


@pytest.mark.parametrize("name", ["default-cpuu", "recipes/default-cpu.toml", "", "../config"])
def test_an_unknown_recipe_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        TrainingError,
        match=r"no recipe '.*: .*default-cpu, default-cpu-codes, default-cpu-codes-long",
    ):
        DistillConfig.from_toml(name)
