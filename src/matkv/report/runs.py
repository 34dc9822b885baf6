"""What a report reads: artifacts, and the rows that were measured of exactly these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.artifact.results import load_rows
from matkv.artifact.setting import Setting, was_uniform
from matkv.errors import MatkvError
from matkv.report.rows import Row, RowT, number, read

KINDS = ("perplexity", "tasks", "needle", "positions", "peers", "benchmark", "samples")


@dataclass(frozen=True, kw_only=True)
class Run:
    """An artifact with its rows by kind, and how many rows of each kind are of another one.

    A row is stale where it was measured with other bases, or with ranks that are neither the
    stored table's of its budget nor uniform; it is counted, and left out.
    """

    name: str
    artifact: Artifact
    digest: str
    rows: dict[str, list[Record]]
    stale: dict[str, int]
    typed: dict[type[Row], list[Any]] = field(default_factory=dict, repr=False, compare=False)

    def read(self, kind: type[RowT]) -> list[RowT]:
        """The rows of one kind that say all that they must."""
        if kind not in self.typed:
            self.typed[kind] = read(kind, self.rows[kind.kind])
        return self.typed[kind]

    @property
    def model(self) -> str:
        return self.artifact.base_model


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs, named as shortly as tells them apart.

    Raises:
        ArtifactError: one is no artifact, or its results are damaged.
        MatkvError: none is given, one twice, or they are of several models.
    """
    folders = [Path(path).resolve() for path in paths]
    if not folders:
        raise MatkvError("a report needs at least one RUN")
    if len(set(folders)) < len(folders):
        raise MatkvError("the same RUN is given twice: name each once")
    artifacts = [Artifact.load(folder) for folder in folders]
    digests = [artifact.digest for artifact in artifacts]
    runs = [
        _read(folder, name, artifact, digests)
        for folder, name, artifact in zip(folders, names_of(folders), artifacts, strict=True)
    ]
    models = {(run.artifact.geometry, run.artifact.fingerprint) for run in runs}
    if len(models) > 1:
        names = ", ".join(f"{run.name} of {run.model}" for run in runs)
        raise MatkvError(f"these runs are of several models ({names}): make a report of each")
    return runs


def _read(folder: Path, name: str, artifact: Artifact, digests: Sequence[str]) -> Run:
    """One run; the rows of peers may be of any run in the report, as they are measured together."""
    ours = artifact.digest
    rows: dict[str, list[Record]] = {}
    stale: dict[str, int] = {}
    for kind in KINDS:
        found = load_rows(folder, kind)
        if kind == "peers":
            rows[kind] = [row for row in found if row.get("artifact") in {None, *digests}]
        else:
            mine = [row for row in found if row.get("artifact") in {None, ours}]
            told = [row | _way_of(row, artifact) for row in mine]
            rows[kind] = [row for row in told if row["uniform"] is not None]
        stale[kind] = len(found) - len(rows[kind])
    return Run(name=name, artifact=artifact, digest=ours, rows=rows, stale=stale)


def _way_of(row: Record, artifact: Artifact) -> Record:
    """Whether ranks were uniform, and whether exact tokens are those that the artifact stores."""
    exact, asked = (row.get("sink") or 0, row.get("recent") or 0), (artifact.sink, artifact.recent)
    bare = not any(exact) and any(asked)
    return {"uniform": was_uniform(row, artifact), "stored": exact == asked, "bare": bare}


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names of directories, as short as tells them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


@dataclass(frozen=True, kw_only=True)
class Series(Generic[RowT]):
    """The rows of one budget, None for the full cache, used in one way."""

    budget: float | None
    way: Setting
    rows: Sequence[RowT]

    def __str__(self) -> str:
        special = "" if self.budget is None else self.rows[0].special
        return percent(self.budget) + (f", {special}" if special else "")


def series(rows: Sequence[RowT]) -> list[Series[RowT]]:
    """The full cache, then falling budgets, each in all its ways, the plain one first."""
    found: dict[tuple[object, ...], list[RowT]] = {}
    for row in rows:
        how = () if row.budget is None else (-row.budget, row.uniform, row.sink, row.recent)
        found.setdefault(how, []).append(row)
    return [
        Series(budget=its[0].budget, way=its[0].way if how else Setting(), rows=its)
        for how, its in sorted(found.items())
    ]


Styles = dict[float | None, int | None]


def styles(runs: Sequence[Run]) -> Styles:
    """One style for each budget, the same in every picture; None, grey, for the full cache."""
    rows = [row for run in runs for kind in KINDS if kind != "peers" for row in run.rows[kind]]
    tables = [budget for run in runs for budget in run.artifact.tables]
    measured = {budget for row in rows if (budget := number(row, "budget")) is not None}
    budgets = sorted({*measured, *tables}, reverse=True)
    return {None: None} | {budget: index for index, budget in enumerate(budgets)}


def line_name(run: Run, runs: Sequence[Run], way: Setting) -> str:
    """A run used in a way, as tables and legends call it."""
    parts = (run.name if len(runs) > 1 else "", str(way))
    return ", ".join(part for part in parts if part) or "matkv"


def percent(value: float | None) -> str:
    """A budget as readers write it."""
    return "full cache" if value is None else f"{100 * value:.4g}%"


def amount(value: float) -> str:
    """A perplexity, or its error: two places while they say something."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def title_of(run: Run, runs: Sequence[Run], name: str) -> str:
    """`name`, with the run's where there are several."""
    return name if len(runs) == 1 else f"{run.name}, {name}" if name else run.name


def slug(run: Run, runs: Sequence[Run], name: str) -> str:
    """A file name of a picture, of its run where there are several."""
    return name if len(runs) == 1 else f"{name}-{runs.index(run) + 1}"


def as_text(value: Any) -> str:
    """A setting in a few words: long lists and nested tables are cut short."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {as_text(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        shown = ", ".join(as_text(one) for one in value[:8])
        return shown + (f", … ({len(value)})" if len(value) > 8 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
