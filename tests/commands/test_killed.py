"""Commands killed at any moment leave what was there, and going on gives what a whole run gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import killing


def killed(home: Path, folder: Path, kills: int, *stages: str) -> dict[str, dict[str, int]]:
    """By stage, how often going on gave an equal result, and how often it was refused."""
    script = Path(killing.__file__)
    command = [sys.executable, str(script), str(home), str(folder), str(kills), *stages]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


def test_a_few_kills_in_each_stage(home: Path, tmp_path: Path) -> None:
    for name, found in killed(home, tmp_path, 3, *killing.STAGES).items():
        assert found["equal"] + found["refused"] == 3, name
        # Killed before it kept what it starts from, or after it had ended, nothing can go on.
        assert found["refused"] <= (2 if killing.STAGES[name].may_refuse else 0), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", killing.STAGES)
def test_many_kills(home: Path, tmp_path: Path, stage: str) -> None:
    found = killed(home, tmp_path, 40, stage)[stage]
    assert found["equal"] + found["refused"] == min(40, found["changes"])
    assert found["equal"] > found["refused"]
