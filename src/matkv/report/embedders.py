"""What a report reads of embedding models: how they were trained, and what was measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matkv.artifact.records import Record, weights_digest
from matkv.artifact.results import RESULTS, load_rows
from matkv.errors import MatkvError
from matkv.files import read_json
from matkv.report.rows import number
from matkv.report.runs import names_of

MODEL, MADE = "modules.json", "matkv.json"
SIZES, ARMS = "sizes", "arms"  # kinds of rows
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A directory of an embedding model, of comparisons of them, or of both.

    `sizes` are rows of exactly its weights, `stale` how many are of others; `arms` are rows of
    comparisons, each with the values of all sizes.
    """

    name: str
    made: Record
    sizes: Sequence[Record]
    stale: int
    arms: Sequence[Record]

    @property
    def last_date(self) -> str | None:
        """The day of the newest measurement."""
        how = [row.get("made") for row in (*self.sizes, *self.arms, self.made)]
        days = [str(one["date"]) for one in how if isinstance(one, dict) and one.get("date")]
        return max(days, default=None)


def is_embedder(path: Path) -> bool:
    """Whether a directory has an embedding model, or comparisons of them."""
    return (path / MODEL).is_file() or (path / RESULTS / f"{ARMS}.json").is_file()


def read_embedders(paths: Sequence[str | Path]) -> list[Embedder]:
    """The embedding models, named as shortly as tells them apart.

    Raises:
        ArtifactError: results are damaged.
        MatkvError: one is given twice, or says wrongly how it was made.
    """
    folders = [Path(path).resolve() for path in paths]
    if len(set(folders)) < len(folders):
        raise MatkvError("the same RUN is given twice: name each once")
    return [_read(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]


def _read(folder: Path, name: str) -> Embedder:
    rows = load_rows(folder, SIZES)
    ours = weights_digest(folder) if rows else ""
    sizes = [row for row in rows if row.get("model") == ours and size_of(row) is not None]
    return Embedder(
        name=name,
        made=_made(folder / MADE),
        sizes=[row for row in sizes if number(row, "value") is not None],
        stale=len(rows) - len(sizes),
        arms=[row for row in load_rows(folder, ARMS) if arm_values(row)],
    )


def _made(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        made = read_json(path)
        if not isinstance(made, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise MatkvError(f"{path} is damaged ({error}): train again, or delete it") from error
    return made


def size_of(row: Record) -> Size | None:
    """The layer and dimension of a row."""
    layer, dim = number(row, "layer"), number(row, "dim")
    return None if layer is None or dim is None else (int(layer), int(dim))


def arm_values(row: Record) -> dict[Size, float]:
    """What every size of a comparison's row scores, small to large."""
    found: dict[Size, float] = {}
    values: Any = row.get("values")
    for name in values if isinstance(values, dict) else ():
        layer, _, dim = str(name).partition("x")
        value = number(values, name)
        if value is not None and layer.isdigit() and dim.isdigit():
            found[int(layer), int(dim)] = value
    return dict(sorted(found.items()))
