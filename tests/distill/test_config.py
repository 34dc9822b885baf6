"""Settings, recipe files and the order of examples."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from lessons import quick
from matkv.distill.config import DistillConfig, LoraSettings
from matkv.distill.stage import distill
from matkv.errors import DataError, TrainingError
from tiny import Tiny


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


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (b"stpes = 3", "unknown setting 'stpes'; known are kl, ce"),
        (b"[lora]\nrnk = 3", "unknown setting 'lora_rnk'"),
        (b"lora = 3", "lora 3 must be a table"),
        (b"lora = 3\nlora_rank = 3", "lora 3 must be a table"),
        (b"steps = 3.5", "steps 3.5 must be a whole number"),
        (b"steps = true", "steps True must be a whole number"),
        (b"steps = 1e30", "steps 1e\\+30 must be a whole number"),
        (b"steps = 1_000_000_000_000", "steps 1000000000000 must be at most 2,147,483,647"),
        (b"steps = ", "cannot read the recipe"),
        (b"seed = 1180591620717411303424", "seed 1180591620717411303424 must be below"),
        (b"lr = inf", "lr inf must be a finite number"),
        (b"lr = '1e-2'", "lr '1e-2' must be a number"),
        (b"batch_size = 1_000_000_000", "batch_size 1000000000 must be at most 65,536"),
        (b"[lora]\ndropout = 2", "lora_dropout 2 must be below 1"),
        (b"lora_dropout = 2.0", "lora_dropout 2.0 must be below 1"),
        (b"rungs = 0.5", "rungs 0.5 must be a list"),
        (b"rungs = ['a']", "rungs 'a' must be a number"),
        (b"trackers = ['paper']", "trackers 'paper' must be one of tensorboard"),
        (b"name = '\xff'", "is not UTF-8 text"),
        (b"a = " + b"[" * 100_000, "cannot read the recipe"),
        (b"a" + b".a" * 20_000 + b" = 1", "unknown setting 'a'"),
    ],
)
def test_a_recipe_that_is_wrong_says_so(tmp_path: Path, recipe: bytes, message: str) -> None:
    (tmp_path / "recipe.toml").write_bytes(recipe)
    with pytest.raises(TrainingError, match=message) as caught:
        DistillConfig.from_toml(tmp_path / "recipe.toml")
    assert "\n" not in str(caught.value)


def test_tables_and_flat_names_say_the_same(tmp_path: Path) -> None:
    tables, flat = tmp_path / "tables.toml", tmp_path / "flat.toml"
    tables.write_text("steps = 1\n[lora]\nrank = 2\n[local]\nlr = 1\n[probe]\nbudgets = [0.5]\n")
    flat.write_text("steps = 1\nlora_rank = 2\nlocal_lr = 1\nprobe_budgets = [0.5]\n")
    config = DistillConfig.from_toml(tables)
    assert config == DistillConfig.from_toml(flat)
    assert config.lora == LoraSettings(rank=2)
    assert DistillConfig.from_toml(tables, lora_rank=3, lora_lr=0.5).lora == LoraSettings(
        rank=3, lr=0.5
    )
    assert DistillConfig.from_dict(config.to_json()) == config


def test_settings_of_an_older_history_load() -> None:
    """What an artifact's history held before there were tables."""
    config = DistillConfig.from_dict(
        {
            **{"objective": "both", "parametrization": "cayley", "schedule": "ladder"},
            **{"rungs": [0.25, 0.5], "adaptive": False, "random": 1, "rank_step": None},
            **{"draw": "sequence", "recent": 4, "steps": 2, "tokens": None, "minutes": None},
            **{"sequence_length": 16, "batch_size": 4, "micro_batch_size": None, "lr": 0.01},
            **{"warmup_steps": 10, "max_grad_norm": 0.0, "kl": 0.25, "ce": 0.75},
            **{"temperature": 1.0, "local_steps": 100, "local_batch_size": 8, "local_reuse": 6},
            **{"local_lr": 0.01, "lora_rank": 0, "lora_alpha": 32, "lora_dropout": 0.0},
            **{"lora_lr": 0.001, "gradient_checkpointing": False, "seed": 0},
            **{"checkpoint_every": 100, "probe_every": 25, "probe_budgets": [0.75, 0.5]},
            "trackers": [],
        }
    )
    assert config.probe.budgets == (0.75, 0.5)
    assert config.local.batch_size == 8


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        quick().steps = 3  # type: ignore[misc]
