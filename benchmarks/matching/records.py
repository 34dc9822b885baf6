"""What was measured: JSON lines, one for a cell, so that a run goes on where it stopped.

    {"row": {"method": …, "setting": …}, "column": "needle", "data": "3f0c…", "first": 0,
     "values": [{…}, …], "made": {…}}
    {"rows": [{…}, …], "columns": [{…}, …]}     what the last run was to measure

A line is written at once and whole; the piece of one that a kill leaves is dropped by the next run.
A cell that is measured with more items goes on after those it has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matkv.artifact.records import made
from matkv.errors import DataError

Json = dict[str, Any]
IDENTITY = ("model", "dtype", "method", "setting", "artifact", "ranks", "calibrated_on")


def key_of(row: Json) -> str:
    """What tells two rows apart."""
    return json.dumps([row.get(name) for name in IDENTITY])


class Records:
    """The cells of a file.

    Raises:
        DataError: a line but the last is no record.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.cells: dict[tuple[str, str, str], dict[int, Json]] = {}
        self.failures: dict[tuple[str, str, str], str] = {}
        self.made: list[Json] = []
        self.rows: list[Json] = []
        self.columns: list[Json] = []
        whole = 0
        content = file.read_bytes() if file.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file}, line {number} is no record ({error}): delete the line and run again"
                ) from error
            whole += len(line)
        if whole < len(content):
            os.truncate(file, whole)

    def _take(self, record: Json) -> None:
        if "rows" in record:
            self.rows, self.columns = record["rows"], record["columns"]
            return
        cell = key_of(record["row"]), record["column"], record["data"]
        self.made.append(record["made"])
        if "failed" in record:
            self.failures[cell] = record["failed"]
            return
        self.failures.pop(cell, None)
        found = self.cells.setdefault(cell, {})
        found.update(enumerate(record["values"], start=record["first"]))

    def values(self, row: Json, column: str, data: str) -> list[Json]:
        """The values of a cell's items, from the first one on without a gap."""
        found = self.cells.get((key_of(row), column, data), {})
        return [found[index] for index in range(len(found)) if index in found]

    def failure(self, row: Json, column: str, data: str) -> str | None:
        """Why a cell could not be measured, the last time it was tried."""
        return self.failures.get((key_of(row), column, data))

    def plan(self, rows: Sequence[Json], columns: Sequence[Json]) -> None:
        """Say what a run is to measure."""
        self._write({"rows": list(rows), "columns": list(columns)})

    def add(self, row: Json, column: str, data: str, first: int, values: list[Json]) -> None:
        self._write(self._cell(row, column, data) | {"first": first, "values": values})

    def fail(self, row: Json, column: str, data: str, reason: str) -> None:
        self._write(self._cell(row, column, data) | {"failed": reason})

    def _cell(self, row: Json, column: str, data: str) -> Json:
        identity = {name: row.get(name) for name in IDENTITY}
        return {"row": identity, "column": column, "data": data, "made": made()}

    def _write(self, record: Json) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(json.loads(line))
