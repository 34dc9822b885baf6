"""Checkpoints of what is learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from matkv.distill.config import DistillConfig
from matkv.errors import TrainingError

STATE = "trainer_state.json"  # the file that the Trainer writes last
FREE_SETTINGS = ("checkpoint_every", "probe_every", "probe_budgets", "trackers")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; one that a kill cut off lacks its last file."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), path))
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None


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
