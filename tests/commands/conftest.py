"""Fixtures of the commands' tests: a tiny model, a text and a calibrated run, on disk."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from program import Program
from quiz import WORDS, make_run, write_tasks


def passage(seed: int, words: int = 1600) -> str:
    """Words in a random order."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `run`, `data` with tasks, `text.txt` and `held-out.txt`: leave all as they are."""
    home = tmp_path_factory.mktemp("commands")
    make_run(home)
    write_tasks(home / "data")
    (home / "text.txt").write_text(passage(0))
    (home / "held-out.txt").write_text(passage(1))
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of the calibrated run."""
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


@pytest.fixture
def matkv(capsys: pytest.CaptureFixture[str]) -> Program:
    """The command line."""
    return Program(capsys)
