"""Checkpoints of what is learned."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from matkv.artifact.artifact import Artifact
from matkv.artifact.storage import checksum
from matkv.distill.config import DistillConfig
from matkv.errors import TrainingError
from matkv.files import replacing

logger = logging.getLogger(__name__)
SEAL = "checksums.json"  # of all files of a checkpoint, written last
START = "start"  # the artifact that a training in place started from
FREE_SETTINGS = ("checkpoint_every", "probe_every", "probe_budgets", "trackers")


def seal(checkpoint: Path) -> None:
    """Note what every file of a finished checkpoint holds."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    sums = {str(path.relative_to(checkpoint)): checksum(path) for path in files}
    sums.pop(SEAL, None)
    with replacing(checkpoint / SEAL) as new:
        new.write_text(json.dumps(sums, indent=1), encoding="utf-8")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint; None where none was finished.

    Raises:
        TrainingError: there are some, and all are damaged.
    """
    lost: list[str] = []
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if not (checkpoint / SEAL).exists():
            logger.warning("%s was cut off: it is left out", checkpoint)
        elif not _is_sound(checkpoint):
            logger.warning("%s is damaged: it is left out", checkpoint)
            lost.append(checkpoint.name)
        else:
            return checkpoint
    if lost:
        raise TrainingError(
            f"{', '.join(lost)} in {folder}: damaged, and there is no older one: restore one, or "
            "start anew without resume"
        )
    return None


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_sound(checkpoint: Path) -> bool:
    try:
        sums = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        return bool(sums) and all(checksum(checkpoint / name) == sums[name] for name in sums)
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def start_of(artifact: Artifact, folder: Path, *, resume: bool, in_place: bool) -> Artifact:
    """What a training starts from; kept in `folder` if the training writes over the artifact.

    Raises:
        ArtifactError: what was kept is damaged.
        TrainingError: it is no longer there, or never was.
    """
    kept = folder / START
    if resume and kept.is_dir():
        return Artifact.load(kept)
    if resume and in_place:
        raise TrainingError(
            f"nothing to resume in {folder}: what the run started from is not there; it may have "
            "ended; start anew without resume"
        )
    if not resume and os.environ.get("RANK", "0") == "0":  # no process group is there yet
        shutil.rmtree(kept, ignore_errors=True)
        if in_place:
            artifact.save(kept)
    return artifact


def finish(folder: Path) -> None:
    """Remove the folder of a run that has ended; a kill leaves nothing to resume half-removed."""
    aside = folder.with_name(f"{folder.name}.ended-{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):
        folder.rename(aside)
    for left in folder.parent.glob(f"{folder.name}.ended-*"):
        shutil.rmtree(left, ignore_errors=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an earlier run, so that none of them is taken for this one's."""
    for path in folder.glob("checkpoint-*"):
        if path.is_dir():
            shutil.rmtree(path)


def check_same_run(config: DistillConfig, start: str, run: dict[str, Any]) -> None:
    """Make sure that a checkpoint goes on with the settings and bases it was made with.

    Raises:
        TrainingError: it was made with others; the message names the settings.
    """
    # What is learned are turns of the bases at the start: of others they would make anything.
    if run.get("start", start) != start:
        raise TrainingError(
            "the checkpoint started from other bases: resume with the artifact it started from, or "
            "start anew without resume"
        )
    ours, saved = config.to_json(), run["config"]
    names = [name for name in ours if name not in FREE_SETTINGS and ours[name] != saved.get(name)]
    if names:
        changes = ", ".join(f"{name} {saved.get(name)} (now {ours[name]})" for name in names)
        raise TrainingError(
            f"the checkpoint was made with {changes}: resume with the same settings, or start anew "
            "without resume"
        )


def whole(parameter: nn.Parameter) -> Tensor:
    """A copy on the CPU, gathered from all processes where it is sharded."""
    tensor = parameter.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def like(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """The inverse: sharded as the parameter is."""
    if isinstance(parameter, DTensor):
        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
