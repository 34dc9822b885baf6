"""A trained model on disk: a directory of sentence-transformers, and how it was made.

modules.json, config.json, model.safetensors, …    as any model; it loads without matkv
matkv.json                                         base model, settings, data, losses
results/sizes.json                                 what was measured of it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from matkv.embeddings.load import MARKS
from matkv.errors import ModelError, TrainingError
from matkv.files import read_json, replacing, replacing_directory

MADE = "matkv.json"
RESULTS = "results"
# Settings that a resumed training may have changed: they do not change what is learned.
FREE_SETTINGS = ("save_every", "log_every")


def check_out(out: Path) -> None:
    """Make sure that writing a model to `out` destroys nothing else.

    Raises:
        ModelError: something that is no embedding model is there.
    """
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MARKS[0]).is_file()):
        raise ModelError(f"{out} is there and is no embedding model: choose another directory")


def save_model(model: SentenceTransformer, out: Path, made: dict[str, Any] | None) -> None:
    """Write `model` and how it was made; what was there before stays until all is written.

    Raises:
        ModelError: something else is at `out`, or it cannot be written.
    """
    check_out(out)
    old = [path.name for path in out.iterdir() if path.name != RESULTS] if out.is_dir() else []
    try:
        with replacing_directory(out.resolve(), old) as new:
            model.save_pretrained(str(new))
            if made is not None:
                text = json.dumps(made, indent=1)
                (new / MADE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error}; nothing was changed") from error


def read_made(run: Path) -> dict[str, Any] | None:
    """How the model in `run` was made; None where matkv did not make it.

    Raises:
        ModelError: the file that says so is damaged.
    """
    path = run / MADE
    if not path.is_file():
        return None
    try:
        made = read_json(path)
        if not isinstance(made, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error}): train again, or delete it") from error
    return made


def start_checkpoints(folder: Path, about: dict[str, Any]) -> None:
    """Note beside the checkpoints what a resumed training has to have in common with them."""
    with replacing(folder / MADE) as new:
        new.write_text(json.dumps(about, indent=1), encoding="utf-8")


def check_same(folder: Path, about: dict[str, Any]) -> None:
    """Make sure that a resumed training goes on with what it was started with.

    Raises:
        TrainingError: it was started with something else, or never.
    """
    saved = read_made(folder)
    if saved is None:
        raise TrainingError(f"no checkpoint in {folder}: start without --resume")
    names: Sequence[str] = [
        name for name in about if name not in FREE_SETTINGS and about[name] != saved.get(name)
    ]
    if names:
        changes = ", ".join(f"{name} {saved.get(name)} (now {about[name]})" for name in names)
        raise TrainingError(
            f"the checkpoint was made with {changes}: resume with the same settings, or start anew "
            "without --resume"
        )
