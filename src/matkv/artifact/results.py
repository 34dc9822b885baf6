"""Results: what was measured of an artifact, kept beside it in `RUN/results/<kind>.json`.

    {"kind": "perplexity", "rows": [{"artifact": "3f0c…", "made": {…}, "budget": 0.5, …}, …]}

Every row names the artifact and how its cache was set, and says when, on what and by which command
it was made. A row replaces an older one with the same keys, so that a measurement can go on where
it stopped, and what was measured of other bases or other ranks is never taken for these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matkv.artifact.config import CONFIG, read_config
from matkv.artifact.records import Record, made
from matkv.artifact.setting import FULL
from matkv.errors import ArtifactError
from matkv.files import replacing

RESULTS = "results"


@dataclass(frozen=True)
class Kind:
    """The name of a kind of rows, and what tells two of them apart."""

    name: str
    keys: tuple[str, ...]

    def key(self, row: Record) -> str:
        return json.dumps([row.get(name) for name in self.keys])


class Results:
    """The rows of one kind: those of a run, those of another `file`, or none that are kept.

    `again` forgets, of what was measured before, what is asked for.

    Raises:
        ArtifactError: the file is damaged.
    """

    def __init__(
        self, run: str | Path | None, kind: Kind, *, file: Path | None = None, again: bool = False
    ) -> None:
        self.kind = kind
        self.file = file if run is None else results_file(run, kind.name)
        rows = self._read()  # damage is found before anything is measured
        self.known = {} if again else rows

    @property
    def rows(self) -> list[Record]:
        return list(self.known.values())

    def find(self, about: Record) -> Record | None:
        """The row of what has the same keys; it says what `about` says."""
        row = self.known.get(self.kind.key(about))
        return None if row is None else row | about

    def add(self, rows: Sequence[Record], **settings: Any) -> list[Record]:
        """Keep new rows, at once; returns them with how they were made, `settings` included.

        Raises:
            ArtifactError: the file has been damaged meanwhile, or cannot be written.
        """
        new = [{**row, "made": made(**settings)} for row in rows]
        self.put(new)
        return new

    def put(self, rows: Sequence[Record]) -> None:
        """Keep rows as they are, those of other processes too.

        Raises:
            ArtifactError: see `add`.
        """
        new = {self.kind.key(row): row for row in rows}
        self.known |= new
        if self.file is None:
            return
        merged = self._read() | new
        finite = [{name: _finite(row[name]) for name in row} for row in merged.values()]
        try:
            with replacing(self.file) as path, path.open("w", encoding="utf-8") as file:
                json.dump({"kind": self.kind.name, "rows": finite}, file, indent=1)
        except OSError as error:
            raise ArtifactError(
                f"cannot write {self.file}: {error}; nothing was changed"
            ) from error

    def _read(self) -> dict[str, Record]:
        rows = [] if self.file is None else read_rows(self.file)
        return {self.kind.key(row): row for row in rows}


def results_file(run: str | Path, kind: str) -> Path:
    """Where rows of a kind are kept."""
    return Path(run) / RESULTS / f"{kind}.json"


def load_rows(run: str | Path, kind: str) -> list[Record]:
    """The rows of `RUN/results/<kind>.json`, none where there is no such file.

    Raises:
        ArtifactError: the file is damaged.
    """
    return read_rows(results_file(run, kind))


def read_rows(path: Path) -> list[Record]:
    """The rows of a file, none where it is missing; older ones as they were meant.

    Raises:
        ArtifactError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("its rows are not a list of records")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): delete it and measure again") from error
    return _as_meant(rows, path.parent.parent)


def _as_meant(rows: list[Record], run: Path) -> list[Record]:
    """Rows of before 0.2 in the words of today.

    They call the last tokens kept exact a window, spell the full cache in several ways, and where
    they say of exact tokens nothing, they are those of the artifact.
    """
    rows = [{"recent" if name == "window" else name: row[name] for name in row} for row in rows]
    own: Record = {}
    if any("ranks" in row and "recent" not in row for row in rows) and (run / CONFIG).is_file():
        config = read_config(run)
        own = {"sink": config.sink, "recent": config.recent}
    full = [row | FULL if row.get("budget") is None else own | row for row in rows]
    return [new if "ranks" in row else row for row, new in zip(rows, full, strict=True)]


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: None stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
