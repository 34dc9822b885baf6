"""The settings of a distillation, in Python or in a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from matkv.bases.learned import PARAMETRIZATIONS, Parametrization
from matkv.distill.losses import LossWeights
from matkv.errors import TrainingError
from matkv.ranks import check_budget
from matkv.schedule import (
    Axis,
    Cycle,
    Independent,
    Ladder,
    Sandwich,
    Schedule,
    Sizes,
    uniform_rungs,
)

Objective = Literal["local", "end-to-end", "both"]
ScheduleName = Literal["independent", "ladder", "cycle", "sandwich"]
Draw = Literal["sequence", "step"]
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": get_args(Objective),
    "parametrization": PARAMETRIZATIONS,
    "schedule": get_args(ScheduleName),
    "draw": get_args(Draw),
}
POSITIVE = (
    *("sequence_length", "batch_size", "micro_batch_size", "rank_step"),
    *("steps", "tokens", "minutes", "lr", "lora_lr", "lora_alpha"),
    *("local_steps", "local_batch_size", "local_reuse", "local_lr"),
    *("checkpoint_every", "probe_every"),
)
NOT_NEGATIVE = (
    "recent",
    "random",
    "warmup_steps",
    "max_grad_norm",
    "lora_rank",
    "lora_dropout",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How to distill.

    What is learned: `parametrization` of the bases; with `lora_rank` above 0 also adapters on the
    attention's projections, scaled by `lora_alpha / lora_rank`.

    Which ranks: `schedule` over multiples of `rank_step` (an eighth of the head dim unless given),
    drawn for every `sequence` or once for all sequences of a `step`; `rungs` are the budgets of a
    ladder or cycle, `random` the independent draws of a sandwich. With `adaptive` the rungs are the
    rank tables that the artifact stores for these budgets, and it keeps them; else equal ranks
    everywhere, and the tables found for the old bases are dropped.

    `recent` tokens stay exact behind every query, as many as the artifact says unless given; the
    new artifact then says the same.

    Stages: `objective` "local" fits every layer's attention output by itself, "end-to-end" the
    model's output, "both" one after the other. The local stage takes `local_steps` of
    `local_batch_size` sequences and uses every recorded sequence `local_reuse` times.

    How long end to end: `steps`, `tokens` or `minutes`, the first to be reached; a step takes
    `batch_size` sequences over all processes, `micro_batch_size` at a time in each. The learning
    rates rise for `warmup_steps` and fall to zero as a cosine.

    Watching: the loss of held-out text at `probe_budgets` every `probe_every` steps; `trackers` are
    the Trainer's, "tensorboard" or "trackio".

    Loss: `kl` and `ce` weigh divergence and cross-entropy (see losses.py).

    Raises:
        TrainingError, BudgetError: a value is out of range; the message says which is allowed.
    """

    objective: Objective = "end-to-end"
    parametrization: Parametrization = "cayley"
    schedule: ScheduleName = "independent"
    rungs: tuple[float, ...] = (0.25, 0.375, 0.5, 0.75)
    adaptive: bool = False
    random: int = 1
    rank_step: int | None = None
    draw: Draw = "sequence"
    recent: int | None = None

    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    sequence_length: int = 256
    batch_size: int = 4
    micro_batch_size: int | None = None
    lr: float = 1e-2
    warmup_steps: int = 10
    max_grad_norm: float = 0.0

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0

    local_steps: int = 100
    local_batch_size: int = 8
    local_reuse: int = 6
    local_lr: float = 1e-2

    lora_rank: int = 0
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_lr: float = 1e-3

    gradient_checkpointing: bool = False
    seed: int = 0
    checkpoint_every: int = 100
    probe_every: int = 25
    probe_budgets: tuple[float, ...] = (0.75, 0.5, 0.25)
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise TrainingError(f"{name} {value!r} must be one of {', '.join(allowed)}")
        for budget in (*self.rungs, *self.probe_budgets):
            check_budget(budget)
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainingError(f"{name} {value} must be above 0")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise TrainingError(f"{name} {value} must be 0 or more")
        if self.batch_size % (self.micro_batch_size or 1):
            raise TrainingError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.adaptive and self.schedule not in ("ladder", "cycle"):
            raise TrainingError(f"adaptive needs a ladder or a cycle, not {self.schedule}")
        if self.trains_end_to_end and (self.steps, self.tokens, self.minutes) == (None,) * 3:
            raise TrainingError(f"objective {self.objective} needs steps, tokens or minutes")
        self.loss_weights  # noqa: B018  checks them

    @property
    def trains_end_to_end(self) -> bool:
        return self.objective != "local"

    @property
    def trains_locally(self) -> bool:
        return self.objective != "end-to-end"

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(kl=self.kl, ce=self.ce, temperature=self.temperature)

    @property
    def step_limit(self) -> int | None:
        """End-to-end steps by `steps` and `tokens`; None when only the clock ends it."""
        limits = [] if self.steps is None else [self.steps]
        if self.tokens is not None:
            limits.append(max(1, self.tokens // (self.batch_size * self.sequence_length)))
        return min(limits, default=None)

    def make_schedule(
        self, axes: tuple[Axis, ...], tables: Mapping[float, Sizes] | None = None
    ) -> Schedule:
        """The schedule that the settings name; `tables` are the rank tables that `adaptive` takes.

        Raises:
            TrainingError: there is no table for a rung.
        """
        if self.schedule == "independent":
            return Independent(axes)
        if self.schedule == "sandwich":
            return Sandwich(axes, self.random)
        rungs = uniform_rungs(axes, self.rungs)
        if self.adaptive:
            missing = [f"{budget:g}" for budget in self.rungs if budget not in (tables or {})]
            if missing:
                raise TrainingError(
                    f"no rank table for budgets {', '.join(missing)}: run matkv allocate first, or "
                    "leave adaptive out"
                )
            rungs = tuple((tables or {})[budget] for budget in self.rungs)
        return Ladder(axes, rungs) if self.schedule == "ladder" else Cycle(axes, rungs)

    def to_json(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DistillConfig:
        """Settings by name; a list stands for a tuple and whole numbers for fractional ones.

        Raises:
            TrainingError: a name is unknown or a value has the wrong type.
        """
        known = {field.name: field.type for field in fields(cls)}
        for name, value in data.items():
            if name not in known:
                raise TrainingError(f"unknown setting {name!r}; known are {', '.join(known)}")
            _check_type(name, str(known[name]), value)
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**settings)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> DistillConfig:
        """Settings from a TOML file; `overrides` that are not None replace the file's.

        Raises:
            TrainingError: the file cannot be read, or names a setting that does not exist.
        """
        try:
            with Path(path).open("rb") as file:
                data = tomllib.load(file)
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise TrainingError(f"cannot read the recipe {path}: {error}") from error
        data |= {name: value for name, value in overrides.items() if value is not None}
        return cls.from_dict(data)


def _check_type(name: str, wanted: str, value: Any) -> None:
    kinds: tuple[type, ...] = (str,)
    if wanted.startswith("tuple"):
        kinds = (list, tuple)
    elif wanted == "bool":
        kinds = (bool,)
    elif wanted.startswith("int"):
        kinds = (int,)
    elif wanted.startswith("float"):
        kinds = (int, float)
    nothing = value is None and wanted.endswith("None")
    wrong_bool = isinstance(value, bool) and bool not in kinds
    if not nothing and (not isinstance(value, kinds) or wrong_bool):
        raise TrainingError(f"{name} {value!r} must be {wanted}")
