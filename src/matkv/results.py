"""Results: what was measured of an artifact, kept beside it in `RUN/results/<kind>.json`.

    {"kind": "perplexity", "rows": [{"artifact": "3f0c…", "made": {…}, "budget": 0.5, …}, …]}

Every row names the artifact and the ranks it was measured with, and says when, on what and by which
command it was made. A row replaces an older one with the same keys, so that a measurement can go on
where it stopped, and what was measured of other bases or other ranks is never taken for these.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from matkv.artifact import Artifact
from matkv.errors import ArtifactError
from matkv.files import replacing
from matkv.ranks import SIDES, RankTable

Record = dict[str, Any]
RESULTS = "results"
PACKAGES = ("matkv", "torch", "transformers")


def digest(artifact: Artifact) -> str:
    """A short name of the bases and adapters: equal only where these are bit-equal."""
    total = hashlib.sha256()
    for layer, sides in sorted(artifact.bases.items()):
        for side in SIDES:
            maps = sides[side].maps
            total.update(f"{layer}.{side}".encode())
            for map_GDD in (maps.encode_GDD, maps.decode_GDD):
                total.update(map_GDD.detach().cpu().float().contiguous().numpy().tobytes())
    if artifact.lora is not None:
        for name, tensor in sorted(artifact.lora.tensors.items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return total.hexdigest()[:12]


def digest_of(table: RankTable | None) -> str | None:
    """A short name of a rank table; None for the full cache."""
    if table is None:
        return None
    return hashlib.sha256(json.dumps(table.to_json()).encode()).hexdigest()[:12]


def made(**settings: Any) -> Record:
    """When, where and by which command something was measured; `settings` as seeds are added."""
    return {
        "date": date.today().isoformat(),
        "command": command_line(),
        "hardware": hardware(),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        **settings,
    }


def command_line() -> str:
    """The command as a user would type it, without the directory of the program."""
    program = Path(sys.argv[0]).name
    return shlex.join([program, *sys.argv[1:]])


@cache
def hardware() -> str:
    """The accelerator, or the processor and its threads, in a few words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def load_rows(run: str | Path, kind: str) -> list[Record]:
    """The rows of `RUN/results/<kind>.json`, none where there is no such file.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = _path(run, kind)
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("its rows are not a list of records")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): delete it and measure again") from error
    return rows


def save_rows(run: str | Path, kind: str, rows: Iterable[Record], keys: Sequence[str]) -> Path:
    """Add rows to `RUN/results/<kind>.json`, each in place of an older one with equal `keys`.

    Raises:
        ArtifactError: the file is damaged, or cannot be written.
    """
    path = _path(run, kind)

    def key(row: Record) -> str:
        return json.dumps([row.get(name) for name in keys])

    merged = {key(row): row for row in load_rows(run, kind)}
    for row in rows:
        merged[key(row)] = {name: _finite(value) for name, value in row.items()}
    try:
        with replacing(path) as new, new.open("w", encoding="utf-8") as file:
            json.dump({"kind": kind, "rows": list(merged.values())}, file, indent=1)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error}; nothing was changed") from error
    return path


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: None stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _path(run: str | Path, kind: str) -> Path:
    return Path(run) / RESULTS / f"{kind}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
