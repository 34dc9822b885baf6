"""The settings of a distillation, in Python or in a TOML file."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from matkv.bases.learned import Parametrization
from matkv.distill.losses import LossWeights
from matkv.errors import TrainingError
from matkv.ranks import Budget
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
from matkv.settings import (
    Count,
    Few,
    Length,
    Many,
    NotNegative,
    Number,
    Positive,
    Seed,
    Values,
    flat,
    merged,
    read_recipe,
    settings,
)


@settings(TrainingError, "local_")
class LocalSettings:
    """The stage that fits every layer's attention output by itself."""

    steps: Count = Field(default=100, description="local steps")
    batch_size: Few = Field(default=8, description="sequences of a local step")
    reuse: Few = Field(default=6, description="how often a recorded sequence is used")
    lr: Positive = Field(default=1e-2, description="learning rate of the local stage")


@settings(TrainingError, "lora_")
class LoraSettings:
    """Adapters on the attention's projections, scaled by `alpha / rank`."""

    rank: Annotated[int, Field(ge=0, le=2**16)] = Field(
        default=0, description="rank of LoRA adapters; 0 none"
    )
    alpha: Count = Field(default=32, description="scale of the adapters, over their rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="their dropout")
    lr: Positive = Field(default=1e-3, description="learning rate of the adapters")


@settings(TrainingError, "probe_")
class ProbeSettings:
    """The loss of held-out text on the way."""

    every: Count = Field(default=25, description="steps from one held-out loss to the next")
    budgets: Many[Budget] = Field(
        default=(0.75, 0.5, 0.25), description="budgets of the held-out loss"
    )


@settings(TrainingError)
class DistillConfig(LossWeights):
    """How to distill.

    What is learned: `parametrization` of the bases, and adapters (`lora`).

    Which ranks: `schedule` over multiples of `rank_step`, drawn for every `sequence` or once for
    all sequences of a `step`. With `adaptive` the rungs are the rank tables that the artifact
    stores for these budgets, and it keeps them; else equal ranks everywhere, and the tables found
    for the old bases are dropped. With `codes` they are its tables of ranks and bits, a rung being
    a level of every head: an independent schedule mixes them head by head.

    Stages: `objective` "local" fits every layer's attention output by itself (`local`),
    "end-to-end" the model's output, "both" one after the other. End to end ends with `steps`,
    `tokens` or `minutes`, the first to be reached; the learning rates rise for `warmup_steps` and
    fall to zero as a cosine.

    In a TOML file `local`, `lora` and `probe` are tables, or `lora_rank` stands for `rank` of
    `lora`.

    Raises:
        TrainingError, BudgetError: a value is out of range; the message says which is allowed.
    """

    objective: Literal["local", "end-to-end", "both"] = Field(
        default="end-to-end", description="local, end-to-end or both"
    )
    parametrization: Parametrization = Field(
        default="cayley", description="of the bases: cayley, exp, householder or free"
    )
    schedule: Literal["independent", "ladder", "cycle", "sandwich"] = Field(
        default="independent", description="independent, ladder, cycle or sandwich"
    )
    rungs: Many[Budget] = Field(
        default=(0.25, 0.375, 0.5, 0.75), description="budgets of a ladder or cycle"
    )
    adaptive: bool = Field(default=False, description="the stored rank tables are the rungs")
    codes: bool = Field(
        default=False, description="the stored tables of ranks and bits are the rungs"
    )
    random: Annotated[int, Field(ge=0, le=2**16)] = Field(
        default=1, description="independent draws of a sandwich"
    )
    rank_step: Count | None = Field(
        default=None, description="grain of ranks; an eighth of the head dim unless given"
    )
    draw: Literal["sequence", "step"] = Field(
        default="sequence", description="draw ranks for every sequence, or once a step"
    )
    recent: Number | None = Field(
        default=None, description="last tokens kept exact; as the artifact says unless given"
    )

    steps: Count | None = Field(default=None, description="end-to-end steps")
    tokens: Annotated[int, Field(gt=0, le=2**63 - 1)] | None = Field(
        default=None, description="end-to-end tokens"
    )
    minutes: Positive | None = Field(default=None, description="end-to-end minutes")
    sequence_length: Length = Field(default=256, description="tokens of one sequence")
    batch_size: Few = Field(default=4, description="sequences of a step, over all processes")
    micro_batch_size: Few | None = Field(
        default=None, description="sequences at a time in each process"
    )
    lr: Positive = Field(default=1e-2, description="learning rate of the bases")
    warmup_steps: Number = Field(default=10, description="steps in which learning rates rise")
    max_grad_norm: NotNegative = Field(
        default=0.0, description="norm of gradients at most; 0 for any"
    )

    local: LocalSettings = Field(default_factory=LocalSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    probe: ProbeSettings = Field(default_factory=ProbeSettings)

    gradient_checkpointing: bool = Field(
        default=False, description="less memory, a third more time"
    )
    seed: Seed = Field(default=0, description="seed of the order and of ranks")
    checkpoint_every: Count = Field(
        default=100, description="steps from one checkpoint to the next"
    )
    trackers: Many[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(
        default=(), description="tensorboard, trackio, wandb or mlflow"
    )

    def __post_init__(self) -> None:
        LossWeights.__post_init__(self)
        if self.batch_size % (self.micro_batch_size or 1):
            raise TrainingError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.adaptive and self.schedule not in ("ladder", "cycle"):
            raise TrainingError(f"adaptive needs a ladder or a cycle, not {self.schedule}")
        if self.codes and (self.adaptive or self.trains_locally or self.schedule == "sandwich"):
            raise TrainingError(
                "codes are trained end to end, with an independent schedule, a ladder or a cycle, "
                "and without adaptive"
            )
        if self.trains_end_to_end and (self.steps, self.tokens, self.minutes) == (None,) * 3:
            raise TrainingError(f"objective {self.objective} needs steps, tokens or minutes")

    @property
    def trains_end_to_end(self) -> bool:
        return self.objective != "local"

    @property
    def trains_locally(self) -> bool:
        return self.objective != "end-to-end"

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
        if self.codes:
            rungs = tuple((level,) * len(axes) for level in range(1, len(self.rungs) + 1))
        if self.adaptive:
            check_stored(self.rungs, tables or {}, "adaptive")
            rungs = tuple((tables or {})[budget] for budget in self.rungs)
        return Ladder(axes, rungs) if self.schedule == "ladder" else Cycle(axes, rungs)

    def to_json(self) -> Values:
        """All settings by flat names, as an artifact's history has them."""
        return flat(self)

    @classmethod
    def from_dict(cls, data: Values) -> DistillConfig:
        """Settings by name, flat names and lists for tuples among them.

        Raises:
            TrainingError: a name is unknown or a value is not allowed.
        """
        return merged(cls, data)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> DistillConfig:
        """Settings from a recipe, a TOML file or the name of one of the package's.

        `overrides` that are not None replace the recipe's.

        Raises:
            TrainingError: the file cannot be read, or names a setting that does not exist.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        return merged(cls, read_recipe(path), given)


def check_stored(budgets: Iterable[float], tables: Container[float], setting: str) -> None:
    """Make sure that there is a table for every budget.

    Raises:
        TrainingError: there is none; `setting` is what asks for them.
    """
    missing = [f"{budget:g}" for budget in budgets if budget not in tables]
    if missing:
        raise TrainingError(
            f"no table for budgets {', '.join(missing)}: run matkv allocate first, or leave "
            f"{setting} out"
        )
