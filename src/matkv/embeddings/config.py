"""The settings of a training, in Python or in a TOML file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from matkv.embeddings.data import LossName
from matkv.embeddings.loss import Over
from matkv.embeddings.rungs import Size, check, default_rungs, parse, size_axes
from matkv.errors import TrainingError
from matkv.schedule import Cycle, Independent, Ladder, Sandwich, Schedule
from matkv.settings import read_recipe

ScheduleName = Literal["ladder", "cycle", "sandwich", "independent"]
CHOICES: dict[str, tuple[str, ...]] = {
    "loss": get_args(LossName),
    "schedule": get_args(ScheduleName),
    "distill_over": get_args(Over),
}
POSITIVE = (
    *("steps", "batch_size", "lr", "max_tokens", "save_every", "log_every"),
    *("grain", "full_weight"),
)
NOT_NEGATIVE = ("random", "distill", "max_grad_norm", "seed")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How to train an embedding model of many sizes.

    `schedule` says which sizes a step covers: all `rungs` of a ladder, one of them in a cycle, the
    smallest, the largest and `random` drawn ones in a sandwich, a drawn one if independent; drawn
    are any layer and multiples of `grain` dimensions. Without `rungs` there are six.

    `loss` is "ranking" (MultipleNegativesRankingLoss, scale 20) on anchors with positives, and
    negatives where there are some, or "cosent" (CoSENTLoss) on scored pairs. With `distill` above 0
    the full size teaches the smaller ones, over the `distill_over` "candidates" of a batch or
    "coordinates"; in the mean over sizes it counts `full_weight` times.

    `steps` of `batch_size` examples, texts cut to `max_tokens`, AdamW with `lr` after a share
    `warmup` of the steps and from there linearly to zero, gradients clipped to `max_grad_norm`.
    A checkpoint is written every `save_every` steps.

    Raises:
        TrainingError, SizeError: a value is out of range; the message says which is allowed.
    """

    rungs: str | None = None
    schedule: ScheduleName = "ladder"
    random: int = 1
    grain: int = 32
    loss: LossName = "ranking"
    distill: float = 0.0
    distill_over: Over = "candidates"
    full_weight: float = 1.0

    steps: int = 200
    batch_size: int = 64
    max_tokens: int | None = None
    lr: float = 1e-4
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        for option, allowed in CHOICES.items():
            if getattr(self, option) not in allowed:
                raise TrainingError(
                    f"{option} {getattr(self, option)!r} must be one of {', '.join(allowed)}"
                )
        for option in POSITIVE:
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise TrainingError(f"{option} {value} must be above 0")
        for option in NOT_NEGATIVE:
            if not getattr(self, option) >= 0:
                raise TrainingError(f"{option} {getattr(self, option)} must be 0 or more")
        if not 0 <= self.warmup < 1:
            raise TrainingError(f"warmup {self.warmup} must be in [0, 1), a share of the steps")
        if self.rungs is not None:
            parse(self.rungs)

    def make_schedule(self, full: Size) -> Schedule:
        """The schedule for a model of size `full`.

        Raises:
            SizeError: a rung is outside of the model.
        """
        rungs = default_rungs(*full) if self.rungs is None else check(parse(self.rungs), full)
        if self.schedule == "ladder":
            return Ladder(size_axes(full), rungs)
        if self.schedule == "cycle":
            return Cycle(size_axes(full), rungs)
        axes = size_axes(full, min(self.grain, full[1]))
        return Sandwich(axes, self.random) if self.schedule == "sandwich" else Independent(axes)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EmbedConfig:
        """Settings by name.

        Raises:
            TrainingError: a name is unknown or a value has the wrong type.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        for option, value in data.items():
            if option not in known:
                raise TrainingError(f"unknown setting {option!r}; known are {', '.join(known)}")
            _check_type(option, known[option], value)
        return cls(**data)

    @classmethod
    def from_toml(cls, path: str | Path | None, **overrides: Any) -> EmbedConfig:
        """Settings from a recipe, a TOML file or a name; `overrides` that are not None replace its.

        Raises:
            TrainingError: the file cannot be read, or names a setting that does not exist.
        """
        data = {} if path is None else dict(read_recipe(path, "embed"))
        data |= {option: value for option, value in overrides.items() if value is not None}
        return cls.from_dict(data)


def _check_type(option: str, wanted: str, value: Any) -> None:
    kinds: tuple[type, ...] = (str,)
    if wanted.startswith("int"):
        kinds = (int,)
    elif wanted.startswith("float"):
        kinds = (int, float)
    nothing = value is None and wanted.endswith("None")
    if not nothing and (not isinstance(value, kinds) or isinstance(value, bool)):
        raise TrainingError(f"{option} {value!r} must be {wanted}")
