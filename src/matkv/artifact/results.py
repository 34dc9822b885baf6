"""Results: what was measured of an artifact, kept beside it in `RUN/results/<kind>.json`.

    {"kind": "perplexity", "rows": [{"artifact": "3f0c…", "made": {…}, "budget": 0.5, …}, …]}

Every row names the artifact and the ranks it was measured with, and says when, on what and by which
command it was made. A row replaces an older one with the same keys, so that a measurement can go on
where it stopped, and what was measured of other bases or other ranks is never taken for these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matkv.artifact.records import Record, made
from matkv.errors import ArtifactError
from matkv.files import replacing

RESULTS = "results"


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
    # Rows of before 0.2 call the last tokens kept exact a window.
    return [{"recent" if name == "window" else name: row[name] for name in row} for row in rows]


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


class Store:
    """Measured rows of one kind beside an artifact, or none without a directory.

    `again` forgets, of what was measured before, what is asked for.
    """

    def __init__(
        self, run: Path | None, kind: str, keys: Sequence[str], *, again: bool = False
    ) -> None:
        self.run, self.kind, self.keys = run, kind, keys
        rows = [] if run is None else load_rows(run, kind)  # a damaged file is found here
        self.rows = {} if again else {self._key(row): row for row in rows}

    def find(self, identity: Record) -> Record | None:
        return self.rows.get(self._key(identity))

    def add(self, rows: Sequence[Record], **settings: Any) -> list[Record]:
        """Keep new rows, at once; returns them with how they were made, `settings` included."""
        new = [{**row, "made": made(**settings)} for row in rows]
        self.rows |= {self._key(row): row for row in new}
        if self.run is not None:
            save_rows(self.run, self.kind, new, self.keys)
        return new

    def _key(self, row: Record) -> str:
        return json.dumps([row.get(name) for name in self.keys])
