"""What made an artifact: an entry for every stage, with the settings it ran with.

An artifact keeps entries as JSON, those of other versions as they were; these classes write them,
and read what is asked of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self, TypeVar

from matkv.errors import ArtifactError, TrainingError
from matkv.progress import CurvePoint, Spent
from matkv.schedule import Schedule, schedule_from_json

Json = dict[str, Any]
Curve = tuple[CurvePoint, ...]  # of a training


class Entry(ABC):
    """What one stage says of itself; `stage` is its command."""

    stage: ClassVar[str]

    @abstractmethod
    def to_json(self) -> Json: ...

    @classmethod
    @abstractmethod
    def from_json(cls, entry: Json) -> Self: ...


@dataclass(frozen=True, kw_only=True)
class Calibrated(Entry):
    """A calibration on so many tokens; `settings` are those of its configuration."""

    stage = "calibrate"
    settings: Json = field(default_factory=dict)
    tokens: int = 0

    def to_json(self) -> Json:
        return {"stage": self.stage, **self.settings, "tokens": self.tokens}

    @classmethod
    def from_json(cls, entry: Json) -> Self:
        settings = {name: entry[name] for name in entry if name not in ("stage", "tokens")}
        return cls(settings=settings, tokens=entry.get("tokens", 0))


@dataclass(frozen=True, kw_only=True)
class Distilled(Entry):
    """A distillation: what its stages used, and the sizes that its schedule drew."""

    stage = "distill"
    stages: dict[str, Spent] = field(default_factory=dict)
    interrupted: bool = False
    schedule: Schedule | None = None
    settings: Json = field(default_factory=dict)

    @property
    def smallest_rank(self) -> int:
        """The smallest rank that was trained; 0 where that is not known, and with codes."""
        return (
            0
            if self.schedule is None or self.settings.get("codes")
            else min(self.schedule.smallest)
        )

    @property
    def loss_weights(self) -> tuple[float, float] | None:
        """What divergence and cross-entropy weighed, adding up to one; None if not known."""
        if not {"kl", "ce"} <= self.settings.keys():
            return None
        kl, ce = self.settings["kl"], self.settings["ce"]
        return kl / (kl + ce), ce / (kl + ce)

    def to_json(self) -> Json:
        stages = {name: spent.to_json() for name, spent in self.stages.items()}
        entry = {"stage": self.stage, "stages": stages, "interrupted": self.interrupted}
        schedule = {} if self.schedule is None else {"schedule": self.schedule.to_json()}
        return entry | schedule | {"settings": self.settings}

    @classmethod
    def from_json(cls, entry: Json) -> Self:
        schedule, stages = entry.get("schedule"), entry.get("stages", {})
        return cls(
            stages={name: Spent.from_json(spent) for name, spent in stages.items()},
            interrupted=bool(entry.get("interrupted")),
            schedule=None if schedule is None else schedule_from_json(schedule),
            settings=dict(entry.get("settings", {})),
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a search measured of a table, and of uniform ranks at its budget where these differ.

    Shares are of the columns of one side, KL is in nats a token, an increase a fraction of the full
    cache's perplexity.
    """

    budget: float
    key_share: float | None = None
    value_share: float | None = None
    kl: float | None = None
    perplexity_increase: float | None = None
    uniform_kl: float | None = None
    uniform_perplexity_increase: float | None = None

    def to_json(self) -> Json:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, entry: Json) -> Check:
        return cls(**{one.name: entry[one.name] for one in fields(cls) if one.name in entry})


@dataclass(frozen=True, kw_only=True)
class Allocated(Entry):
    """A search for ranks; `shares` are those of uniform ranks in the tables, by budget."""

    stage = "allocate"
    settings: Json = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False
    shares: dict[float, float] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()

    def to_json(self) -> Json:
        shares = [{"budget": one, "share": self.shares[one]} for one in sorted(self.shares)]
        return {
            "stage": self.stage,
            **self.settings,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "shares": shares,
            "tables": [check.to_json() for check in self.checks],
        }

    @classmethod
    def from_json(cls, entry: Json) -> Self:
        own = ("stage", "seconds", "interrupted", "shares", "tables")
        return cls(
            settings={name: entry[name] for name in entry if name not in own},
            seconds=entry.get("seconds", 0.0),
            interrupted=bool(entry.get("interrupted")),
            shares={one["budget"]: one["share"] for one in entry.get("shares", ())},
            checks=tuple(Check.from_json(one) for one in entry.get("tables", ())),
        )


AnEntry = TypeVar("AnEntry", bound=Entry)
KINDS: tuple[type[Entry], ...] = (Calibrated, Distilled, Allocated)


def entries(history: Sequence[Json], kind: type[AnEntry]) -> list[AnEntry]:
    """All entries of one stage, the oldest first.

    Raises:
        ArtifactError: one is not what that stage writes.
    """
    return [_read(one, kind) for one in history if one.get("stage") == kind.stage]


def check_history(history: Sequence[Json]) -> None:
    """Make sure that what is asked of the entries later can be read.

    Raises:
        ArtifactError: see `entries`.
    """
    for entry in history:
        for kind in KINDS:
            if entry.get("stage") == kind.stage:
                _read(entry, kind)


def _read(entry: Json, kind: type[AnEntry]) -> AnEntry:
    try:
        return kind.from_json(entry)
    except (KeyError, TypeError, ValueError, AttributeError, TrainingError) as error:
        raise ArtifactError(
            f"what the artifact's history says of {kind.stage} is damaged "
            f"({type(error).__name__}: {error}): restore it, or calibrate again"
        ) from error
