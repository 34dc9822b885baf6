"""Which checkpoints a run goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from lessons import quick, text
from matkv.distill.stage import distill
from matkv.errors import TrainingError
from tiny import Tiny


def test_other_settings_do_not_go_on_from_a_checkpoint(llama: Tiny, tmp_path: Path) -> None:
    distill(llama.model, llama.artifact, text(), quick(), checkpoints=tmp_path)
    with pytest.raises(TrainingError, match=r"lr 0\.01 \(now 0\.5\)"):
        distill(
            llama.model, llama.artifact, text(), quick(lr=0.5), checkpoints=tmp_path, resume=True
        )


def test_a_new_run_removes_checkpoints_of_an_older_one(llama: Tiny, tmp_path: Path) -> None:
    for steps in (9, 3):
        distill(llama.model, llama.artifact, text(), quick(steps=steps), checkpoints=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
