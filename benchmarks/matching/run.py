"""Measuring what is not there yet: texts of all rows first, then haystacks, footprints and tasks.

A row whose loss on a text is more than `LOST` nats a token over the full cache's reads no more than
`FEW` windows of it; one that is so on every text has nothing left to lose: no haystack and no task
is asked of it. The full cache comes first, for others are compared with it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matkv.models.default import DEFAULT_MODEL, default_model_dir
from peers import environments
from peers.entries import CALIBRATION_WINDOW

from .child import Cell, Todo, cells
from .material import Footprint, Material, Retrieval, Task, Text
from .records import Json, Records
from .rows import Entry, options_of

LOST, FEW = 1.5, 2
STAGES: tuple[type[Material], ...] = (Text, Retrieval, Footprint)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run measures: rows, columns, and where it keeps them."""

    model: Any
    shared: Json
    entries: Sequence[Entry]
    columns: Sequence[Material]
    records: Records
    training: Sequence[str]  # texts that peers calibrate on
    until: float = float("inf")

    def measure(self) -> None:
        """All that is missing, or what the time allows."""
        rows = [one.row(self.shared) for one in self.entries]
        self.records.plan(rows, [described(one) for one in self.columns])
        for columns in self._stages():
            for entry in self.entries:
                if entry.environment is None and time.monotonic() < self.until:
                    self._here(entry, columns)
            for name in ("quantized", "presses", "shrink"):
                if time.monotonic() < self.until:
                    self._outside(name, columns)
        if time.monotonic() >= self.until:
            print("the time is up: the same command goes on from here", file=sys.stderr)

    def _stages(self) -> Iterator[list[Material]]:
        """Columns in the order in which they are measured, texts first."""
        for stage in STAGES:
            yield [one for one in self.columns if isinstance(one, stage)]
        yield [one for one in self.columns if not isinstance(one, STAGES)]

    def todo(self, entry: Entry, columns: Sequence[Material]) -> Todo:
        """The columns that lack items, and from which one on."""
        row, found = entry.row(self.shared), []
        for column in columns:
            first = len(self.records.values(row, column.column, column.data))
            if entry.level is None and isinstance(column, Text):
                first = min(first, references(column))
            if first < column.count and not self._is_left_out(row, column, first):
                found.append((column, first))
        return found

    def _is_left_out(self, row: Json, column: Material, first: int) -> bool:
        if isinstance(column, Footprint):
            return bool(row["simulated"])
        if isinstance(column, Text):
            return first >= FEW and self._is_lost(row, column)
        return all(self._is_lost(row, one) for one in self.columns if isinstance(one, Text))

    def _is_lost(self, row: Json, text: Text) -> bool:
        return lost(self.records, row, self.entries[0].row(self.shared), text)

    def _here(self, entry: Entry, columns: Sequence[Material]) -> None:
        todo = self.todo(entry, columns)
        for cell in cells(self.model, entry.contestant, todo) if todo else ():
            self._keep(entry, cell)

    def _keep(self, entry: Entry, cell: Cell) -> None:
        (column, first, found), row = cell, entry.row(self.shared)
        if isinstance(found, str):
            self.records.fail(row, column.column, column.data, found)
        else:
            self.records.add(row, column.column, column.data, first, found)
        said = found if isinstance(found, str) else f"{first + len(found)} of {column.count}"
        level = "" if entry.level is None else f"{entry.level:.2%} "
        print(f"{level}{entry.contestant.name}: {column.column}: {said}", file=sys.stderr)

    def _outside(self, name: str, columns: Sequence[Material]) -> None:
        """The entries of one environment, in one process of it."""
        todo = {
            (one.contestant.method, one.contestant.setting): (one, its)
            for one in self.entries
            if one.environment == name and (its := self.todo(one, columns))
        }
        if not todo:
            return
        left = {(*names, column.column) for names, (_, its) in todo.items() for column, _ in its}
        try:
            with tempfile.TemporaryDirectory() as folder:
                job = self._job(name, todo, columns, Path(folder))
                for row in environments.rows_inside(name, "matching.child", job, len(left)):
                    entry, its = todo[row["method"], row["setting"]]
                    left.discard((row["method"], row["setting"], row["column"]))
                    column = next(one for one, _ in its if one.column == row["column"])
                    self._keep(entry, (column, row["first"], row["found"]))
        except (environments.PeerEnvironmentError, OSError) as error:
            for method, setting, lacking in sorted(left):
                entry, its = todo[method, setting]
                column = next(one for one, _ in its if one.column == lacking)
                self._keep(entry, (column, 0, f"{type(error).__name__}: {error}"[:300]))

    def _job(
        self, name: str, todo: Any, columns: Sequence[Material], folder: Path
    ) -> dict[str, Any]:
        model = self.shared["model"]
        source = str(default_model_dir()) if model == DEFAULT_MODEL else model
        texts = folder / "training.txt"
        samples = max(1, self.shared["calibrate_tokens"] // CALIBRATION_WINDOW)
        texts.write_text("\f".join(self.training[:samples]), encoding="utf-8")
        return {
            "module": name,
            "model": source,
            "dtype": self.shared["dtype"],
            "threads": torch.get_num_threads(),
            "options": options_of(name, source, str(texts)),
            "columns": [one.to_json() for one in columns],
            "wanted": [
                (*names, [(column.column, first) for column, first in its])
                for names, (_, its) in todo.items()
            ],
        }


def described(column: Material) -> Json:
    """What a table needs to know of a column; of a task also what guessing gets right."""
    found: Json = {"column": column.column, "kind": column.kind, "data": column.data}
    found |= {"count": column.count}
    if isinstance(column, Task):
        items = [item for block in column.blocks for item in block.items]
        found |= {"chance": sum(1 / len(one.choices) for one in items) / len(items)}
        found |= {"shots": max(len(block.shots) for block in column.blocks)}
    if isinstance(column, Retrieval):
        found |= {"context": len(column.prompts[0].prompt)}
    return found


def references(column: Text) -> int:
    """How many windows have what the full cache predicted, from the first one on."""
    found = 0
    while (Path(column.reference) / f"{found}.pt").exists():
        found += 1
    return found


def lost(records: Records, row: Json, full: Json, column: Text) -> bool:
    """Whether a row's loss is beyond `LOST` over the full cache's, on the windows of both."""
    own = records.values(row, column.column, column.data)
    base = records.values(full, column.column, column.data)
    pairs = [one["loss"] - other["loss"] for one, other in zip(own, base, strict=False)]
    return bool(pairs) and sum(pairs) / len(pairs) > LOST
