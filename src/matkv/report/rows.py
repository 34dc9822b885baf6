"""Rows of results as a report reads them: typed, with None for what is missing.

A row without a number that it cannot do without is none: it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Self, TypeVar

from matkv.artifact.records import Record
from matkv.artifact.setting import Setting


def number(row: Record, name: str) -> float | None:
    """A finite number of a record; None where there is none."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What rows of every kind say: the budget, None for the full cache, and how the cache was set.

    `stored` says that its exact tokens are those that the artifact asks for, which need no mention,
    `bare` that it asks for some and there are none.

    Fields without a default are numbers that must be there, those with None may be missing; the
    others are of their default's type.
    """

    kind: ClassVar[str]
    budget: float | None = None
    uniform: bool = False
    sink: int = 0
    recent: int = 0
    stored: bool = False
    bare: bool = False
    dtype: str = ""

    @classmethod
    def from_json(cls, record: Record) -> Self | None:
        """The row of a record; None where a number is missing or is no number."""
        values = {one.name: _value(record, one.name, one.default) for one in fields(cls)}
        needed = [one.name for one in fields(cls) if one.default is MISSING]
        unread = record.get("budget") is not None and values["budget"] is None
        if unread or any(values[name] is None for name in needed):
            return None
        return cls(**values)

    @property
    def way(self) -> Setting:
        """How the run was used, whatever the budget."""
        return Setting(uniform=self.uniform, sink=self.sink, recent=self.recent)

    @property
    def special(self) -> str:
        """What is to be said of the way, nothing of the one that the artifact asks for."""
        parts = [str(Setting(uniform=self.uniform) if self.stored else self.way)]
        parts.append("no token exact" if self.bare else "")
        return ", ".join(part for part in parts if part)

    @property
    def dash(self) -> int:
        """How lines of this way are drawn: of plain, uniform, exact and both another."""
        other = self.bare or (not self.stored and self.sink + self.recent > 0)
        return int(self.uniform) + 2 * int(other)


def _value(record: Record, name: str, default: Any) -> Any:
    value = record.get(name)
    if isinstance(default, bool):
        return bool(value)
    if isinstance(default, str):
        return default if value is None else str(value)
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, list) else default
    found = number(record, name)
    if found is None:
        return None if default is MISSING else default
    return int(found) if isinstance(default, int) else found


RowT = TypeVar("RowT", bound=Row)


def read(kind: type[RowT], records: Iterable[Record]) -> list[RowT]:
    """The rows of one kind that can be read."""
    return [row for record in records if (row := kind.from_json(record)) is not None]


@dataclass(frozen=True)
class Source:
    """What perplexity was measured on: a text in windows of so many tokens, in one dtype."""

    text: str
    window_tokens: int | None = None
    dtype: str = ""
    digest: str = ""

    def __str__(self) -> str:
        length = "" if self.window_tokens is None else f"{self.window_tokens:,}-token windows"
        return ", ".join(part for part in (self.text, length, self.dtype) if part)


@dataclass(frozen=True, kw_only=True)
class OnText(Row):
    """A row that was measured on a text."""

    text: str = "held-out text"
    window_tokens: float | None = None
    length: float | None = None
    context: float | None = None
    data: str = ""
    text_digest: str = ""

    @property
    def source(self) -> Source:
        length = self.window_tokens or self.length or self.context
        tokens = None if length is None else int(length)
        return Source(self.text_name, tokens, self.dtype, self.data or self.text_digest)

    @property
    def text_name(self) -> str:
        """The text as readers know it: a file by its name, the packaged one by what it is."""
        if self.text == "default":
            return "held-out articles"
        return self.text.rstrip("/").split("/")[-1]


@dataclass(frozen=True, kw_only=True)
class Measured(OnText):
    """A perplexity, with the error of its mean log-likelihood."""

    kind = "perplexity"
    perplexity: float
    stderr: float | None = None
    kept: float | None = None
    held: float | None = None
    bytes_per_token: float | None = None

    @property
    def share(self) -> float:
        """The share of bytes that the ranks really keep."""
        asked = 1.0 if self.budget is None else self.budget
        return asked if self.kept is None else self.kept

    @property
    def spread(self) -> tuple[float, float] | None:
        """One standard error to either side; None where the error is not known."""
        if self.stderr is None:
            return None
        return self.perplexity * (1 - self.stderr), self.perplexity * (1 + self.stderr)


@dataclass(frozen=True, kw_only=True)
class Position(OnText):
    """The perplexity of tokens at the positions from `start` to `end`."""

    kind = "positions"
    start: float
    end: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Peer(Measured):
    """The perplexity of any method; `budget` counts its projections, `bytes_per_token` does not."""

    kind = "peers"
    bytes_per_token: float = field()  # without a default, unlike the field it replaces
    method: str = "unnamed"
    family: str = ""
    setting: str = ""
    note: str = ""
    losses: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}".strip()

    @property
    def is_full(self) -> bool:
        """Whether a row is the full cache, in whatever environment."""
        return self.family == "full" or self.method.startswith("full")

    @property
    def is_ours(self) -> bool:
        return self.family.startswith("matkv") or self.method.startswith("matkv")


@dataclass(frozen=True, kw_only=True)
class Scored(Row):
    """The accuracy on `n` questions of a task."""

    kind = "tasks"
    acc: float
    n: int = 0
    stderr: float | None = None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    chance: float | None = None
    task: str = ""


@dataclass(frozen=True, kw_only=True)
class Needle(Row):
    """The accuracy of finding what was hidden at one depth of a context, over `n` samples."""

    kind = "needle"
    context: float
    accuracy: float
    depth: float | None = None
    n: int = 1
    stderr: float | None = None
    answer_loss: float | None = None
    test: str = ""
    filler: str = ""

    @property
    def title(self) -> str:
        """The test, and what hides its fact."""
        return ", ".join(part for part in (self.test, self.filler) if part) or "needle"


@dataclass(frozen=True, kw_only=True)
class Timed(Row):
    """The time and memory of decoding steps."""

    kind = "benchmark"
    context: float
    batch: float
    step_ms: float
    step_ms_low: float | None = None
    step_ms_high: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    tokens_per_second: float | None = None
    first_token_ms: float | None = None
    weight_bytes: float | None = None
    cache_bytes: float | None = None
    peak_bytes: float | None = None
    name: str = ""

    @property
    def label(self) -> str:
        """The cache as legends call it."""
        if self.budget is None:
            return self.name
        return ", ".join(part for part in (f"matkv {100 * self.budget:.4g}%", self.special) if part)

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Of the time of a step."""
        if self.step_ms_low is None or self.step_ms_high is None:
            return None
        return self.step_ms_low, self.step_ms_high

    @property
    def resident_bytes(self) -> float | None:
        """Weights and cache."""
        if self.weight_bytes is None or self.cache_bytes is None:
            return None
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True, kw_only=True)
class Told(Row):
    """An answer to a prompt."""

    kind = "samples"
    prompt: str = ""
    text: str = ""
