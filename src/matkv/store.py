"""What was measured before, found again: a measurement goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matkv import results
from matkv.results import Record


class Store:
    """Measured rows of one kind beside an artifact, or none without a directory.

    `again` forgets, of what was measured before, what is asked for.
    """

    def __init__(
        self, run: Path | None, kind: str, keys: Sequence[str], *, again: bool = False
    ) -> None:
        self.run, self.kind, self.keys = run, kind, keys
        rows = [] if run is None else results.load_rows(run, kind)  # a damaged file is found here
        self.rows = {} if again else {self._key(row): row for row in rows}

    def find(self, identity: Record) -> Record | None:
        return self.rows.get(self._key(identity))

    def add(self, rows: Sequence[Record], **settings: Any) -> list[Record]:
        """Keep new rows, at once; returns them with how they were made, `settings` included."""
        new = [{**row, "made": results.made(**settings)} for row in rows]
        self.rows |= {self._key(row): row for row in new}
        if self.run is not None:
            results.save_rows(self.run, self.kind, new, self.keys)
        return new

    def _key(self, row: Record) -> str:
        return json.dumps([row.get(name) for name in self.keys])
