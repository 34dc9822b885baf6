"""Checkpoints that were damaged or cut off: the last sound one goes on to the same bases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lessons import quick, same_bases, text
from matkv.artifact.artifact import Artifact
from matkv.distill.checkpoints import SEAL, last_checkpoint
from matkv.distill.stage import distill
from matkv.errors import TrainingError
from tiny import Tiny, tiny

STEPS = {"steps": 6, "checkpoint_every": 2}


def train(subject: Tiny, folder: Path, *, resume: bool = False) -> Artifact:
    config = quick(**STEPS)
    return distill(
        subject.model, subject.artifact, text(), config, checkpoints=folder, resume=resume
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Artifact, Path]:
    subject, folder = tiny("llama"), tmp_path_factory.mktemp("trained")
    made = train(subject, folder)
    subject.model.requires_grad_(True)
    return subject, made, folder


@pytest.fixture
def folder(trained: tuple[Tiny, Artifact, Path], tmp_path: Path) -> Path:
    """A copy of the checkpoints of the whole run: the last two."""
    copy = Path(shutil.copytree(trained[2], tmp_path / "checkpoints"))
    assert sorted(path.name for path in copy.glob("*")) == ["checkpoint-4", "checkpoint-6"]
    return copy


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unseal(checkpoint: Path) -> None:
    """As a kill leaves it: files are missing, and nothing says what they should hold."""
    (checkpoint / SEAL).unlink()
    (checkpoint / "trainer_state.json").unlink()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "optimizer missing": lambda one: (one / "optimizer.pt").unlink(),
    "optimizer flipped": lambda one: flip(one / "optimizer.pt"),
    "bases flipped": lambda one: flip(one / "learned.safetensors"),
    "bases missing": lambda one: (one / "learned.safetensors").unlink(),
    "settings flipped": lambda one: flip(one / "run.json"),
    "state flipped": lambda one: flip(one / "trainer_state.json"),
    "checksums flipped": lambda one: flip(one / SEAL),
    "checksums deep": lambda one: (one / SEAL).write_text("[" * 100_000),
    "cut off": unseal,
    "all of it": lambda one: shutil.rmtree(one),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_last_sound_checkpoint_goes_on_to_the_same_bases(
    trained: tuple[Tiny, Artifact, Path],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    subject, whole, _ = trained
    DAMAGES[name](folder / "checkpoint-6")
    assert last_checkpoint(folder) == folder / "checkpoint-4"
    if name != "all of it":
        assert "checkpoint-6 was cut off" in caplog.text or "checkpoint-6 is damaged" in caplog.text
    made = train(subject, folder, resume=True)
    assert same_bases(made, whole)
    for layer, sides in made.bases.items():
        for side, bases in sides.items():
            assert bases.energy_GD.equal(whole.bases[layer][side].energy_GD)
    assert last_checkpoint(folder) == folder / "checkpoint-6"  # written again


def test_a_finished_run_resumes_to_itself(
    trained: tuple[Tiny, Artifact, Path], folder: Path
) -> None:
    subject, whole, _ = trained
    assert same_bases(train(subject, folder, resume=True), whole)


def test_damage_of_every_checkpoint_is_an_error(
    trained: tuple[Tiny, Artifact, Path], folder: Path
) -> None:
    flip(folder / "checkpoint-4" / "optimizer.pt")
    flip(folder / "checkpoint-6" / "learned.safetensors")
    with pytest.raises(TrainingError, match=r"checkpoint-6, checkpoint-4 in .*start anew") as error:
        train(trained[0], folder, resume=True)
    assert "\n" not in str(error.value)


def test_checkpoints_cut_off_alone_are_as_none(
    trained: tuple[Tiny, Artifact, Path], folder: Path
) -> None:
    for checkpoint in folder.iterdir():
        unseal(checkpoint)
    assert last_checkpoint(folder) is None
    assert same_bases(train(trained[0], folder, resume=True), trained[1])


def test_a_checkpoint_says_what_each_of_its_files_holds(folder: Path) -> None:
    checkpoint = folder / "checkpoint-6"
    sums = json.loads((checkpoint / SEAL).read_text())
    others = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(sums) == others - {SEAL}
    assert {"learned.safetensors", "optimizer.pt", "run.json", "trainer_state.json"} <= set(sums)
