"""A search's rounds on disk, so that a search cut off goes on where it stopped.

JSON lines: the first names the search by a digest of all that determines it, each further one holds
a round's drops, what was measured in it, and a checksum. Under several processes the first writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from matkv.errors import MatkvError
from matkv.files import digest, replacing


@dataclass(frozen=True)
class Round:
    """Units dropped in one round, the KL where the round started, and the seconds it took."""

    drops: tuple[int, ...]
    kl: float
    seconds: float


class SearchState:
    """Rounds done, appended to `path` one by one; kept in memory alone where `path` is None.

    Raises:
        MatkvError: `path` belongs to another search, or cannot be read or written.
    """

    def __init__(self, path: Path | None, digest: str) -> None:
        self.path, self.digest = path, digest
        self.rounds: list[Round] = []
        self.writes = not dist.is_initialized() or dist.get_rank() == 0
        if path is not None:
            self.rounds = _shared(self._read(path) if self.writes else [])

    @property
    def drops(self) -> list[int]:
        return [unit for done in self.rounds for unit in done.drops]

    def add(self, drops: Sequence[int], kl: float, seconds: float) -> None:
        self.rounds.append(Round(tuple(drops), kl, seconds))
        if self.path is not None and self.writes:
            record = asdict(self.rounds[-1])
            self._append(self.path, record | {"sum": _sum(record)})

    def _read(self, path: Path) -> list[Round]:
        """Whole rounds; a last line cut off by a kill is removed."""
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                with replacing(path) as new:
                    new.write_text(whole, encoding="utf-8")
            if not whole:
                self._append(path, {"search": self.digest})
                return []
            head, *lines = whole.splitlines()
            if head == json.dumps({"search": self.digest}):
                return [_round(line) for line in lines]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise MatkvError(f"cannot resume from {path}: {error}; delete it") from error
        raise MatkvError(
            f"{path} belongs to a search with other settings, text or bases: repeat those to "
            "resume it, or delete it to start anew"
        )

    def _append(self, path: Path, record: dict[str, object]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise MatkvError(f"cannot write {path}: {error.strerror}; free some space") from error


def _round(line: str) -> Round:
    record = json.loads(line)
    if record.pop("sum", None) != _sum(record):
        raise ValueError("the checksum of a round is not the one it names")
    drops = tuple(int(unit) for unit in record["drops"])
    return Round(drops, float(record["kl"]), float(record["seconds"]))


def _sum(record: dict[str, object]) -> str:
    return digest(json.dumps(record).encode())


def _shared(rounds: list[Round]) -> list[Round]:
    """The first process's rounds, in every process."""
    if dist.is_initialized():
        box = [rounds]
        dist.broadcast_object_list(box)
        return box[0]
    return rounds
