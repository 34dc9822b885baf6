"""The settings of a training, in Python or in a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from matkv.embeddings.data import LossName
from matkv.embeddings.loss import Over
from matkv.embeddings.rungs import Size, check, default_rungs, parse, size_axes
from matkv.errors import TrainingError
from matkv.schedule import Cycle, Independent, Ladder, Sandwich, Schedule
from matkv.settings import (
    Count,
    Few,
    NotNegative,
    Positive,
    Seed,
    Values,
    flat,
    merged,
    read_recipe,
    settings,
)


@settings(TrainingError)
class EmbedConfig:
    """How to train an embedding model of many sizes.

    `schedule` says which sizes a step covers: all `rungs` of a ladder, one of them in a cycle, the
    smallest, the largest and `random` drawn ones in a sandwich, a drawn one if independent; drawn
    are any layer and multiples of `grain` dimensions. Without `rungs` there are six.

    `loss` is "ranking" (MultipleNegativesRankingLoss, scale 20) on anchors with positives, and
    negatives where there are some, or "cosent" (CoSENTLoss) on scored pairs. With `distill` above 0
    the full size teaches the smaller ones, over the `distill_over` "candidates" of a batch or
    "coordinates"; in the mean over sizes it counts `full_weight` times. `balanced` keeps the small
    sizes, whose losses are the largest, from crowding out the full one.

    AdamW, with `lr` after a share `warmup` of the steps and from there linearly to zero.

    Raises:
        TrainingError, SizeError: a value is out of range; the message says which is allowed.
    """

    rungs: str | None = Field(default=None, description="sizes LAYERxDIM: 1x32,2x64")
    schedule: Literal["ladder", "cycle", "sandwich", "independent"] = Field(
        default="ladder", description="ladder, cycle, sandwich or independent"
    )
    random: Annotated[int, Field(ge=0, le=2**16)] = Field(
        default=1, description="independent draws of a sandwich"
    )
    grain: Count = Field(default=32, description="drawn dimensions are multiples of it")
    loss: LossName = Field(default="ranking", description="ranking or cosent (scored pairs)")
    distill: NotNegative = Field(
        default=0.0, description="weight of what the full size teaches the others"
    )
    distill_over: Over = Field(default="candidates", description="candidates or coordinates")
    full_weight: Positive = Field(default=1.0, description="how often the full size counts")
    balanced: bool = Field(default=False, description="gradients of all sizes equally large")

    steps: Count = Field(default=200, description="training steps")
    batch_size: Few = Field(default=64, description="examples a step")
    max_tokens: Count | None = Field(
        default=None, description="tokens of a text; the model's own limit unless given"
    )
    lr: Positive = Field(default=1e-4, description="learning rate")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="share of the steps"
    )
    max_grad_norm: NotNegative = Field(default=1.0, description="gradients are clipped to it")
    seed: Seed = Field(default=0, description="seed of batches, draws and dropout")
    save_every: Count = Field(default=100, description="steps from one checkpoint to the next")
    log_every: Count = Field(default=10, description="steps from one logged loss to the next")

    def __post_init__(self) -> None:
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

    def to_json(self) -> Values:
        """Plain data that `from_dict` takes."""
        return flat(self)

    @classmethod
    def from_dict(cls, data: Values) -> EmbedConfig:
        """Settings by name.

        Raises:
            TrainingError, SizeError: a name is unknown or a value is not allowed.
        """
        return merged(cls, data)

    @classmethod
    def from_toml(cls, path: str | Path | None, **overrides: Any) -> EmbedConfig:
        """Settings from a recipe, a TOML file or a name; `overrides` that are not None replace its.

        Raises:
            TrainingError: the file cannot be read, or names a setting that does not exist.
        """
        recipe = {} if path is None else read_recipe(path, "embed")
        given = {option: value for option, value in overrides.items() if value is not None}
        return merged(cls, recipe, given)
