"""Training by the Trainer of sentence-transformers; batches, checkpoints and logs are its own.

`matkv embed train` and the comparisons of benchmarks/embedding_arms.py run through `fit`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.training_args import (
    BatchSamplers,
    SentenceTransformerTrainingArguments,
)
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from matkv.embeddings.config import EmbedConfig
from matkv.embeddings.loss import LadderLoss
from matkv.embeddings.rungs import full_size
from matkv.errors import TrainingError
from matkv.progress import Interrupt, own_randomness


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a training stands: the loss of its last logged steps, part by part."""

    step: int
    steps: int
    loss: float
    parts: dict[str, float]
    seconds: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training did; `curve` is the loss, part by part, every `log_every` steps.

    Steps and seconds count from the start, whether or not it was resumed.
    """

    steps: int
    seconds: float
    interrupted: bool
    curve: list[dict[str, float]] = field(default_factory=list)


SECONDS = "seconds.txt"  # in a checkpoint
OnStep = Callable[[Step], None]


def base_loss(model: SentenceTransformer, config: EmbedConfig) -> nn.Module:
    """The loss that the settings name, over one size."""
    ranking = config.loss == "ranking"
    loss: nn.Module = (
        losses.MultipleNegativesRankingLoss(model) if ranking else losses.CoSENTLoss(model)
    )
    return loss


def ladder_loss(model: SentenceTransformer, config: EmbedConfig) -> LadderLoss:
    """The loss that the settings name, over the sizes of their schedule.

    Raises:
        SizeError, TrainingError: the sizes or the settings do not fit the model.
        UnsupportedModelError: the model has no layers to cut.
    """
    return LadderLoss(
        model,
        base_loss(model, config),
        config.make_schedule(full_size(model)),
        distill=config.distill,
        distill_over=config.distill_over,
        full_weight=config.full_weight,
        balanced=config.balanced,
        seed=config.seed,
    )


def fit(
    model: SentenceTransformer,
    columns: dict[str, list[Any]],
    loss: nn.Module,
    config: EmbedConfig,
    checkpoints: Path,
    *,
    resume: bool = False,
    on_start: Callable[[], None] | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Train `model` with `loss` until its steps are done or Ctrl-C asks to stop.

    The folder `checkpoints` has what a later call with `resume` goes on from; without it, what an
    earlier training left there is removed. `on_start` is called once that is done.

    Raises:
        TrainingError: there are fewer examples than a batch, there is no checkpoint to resume, or
            the loss is not a finite number.
    """
    examples = len(next(iter(columns.values())))
    if examples < config.batch_size:
        raise TrainingError(f"{examples} examples are less than a batch of {config.batch_size}")
    checkpoint = _checkpoint(checkpoints, resume)
    if on_start is not None:
        on_start()
    with own_randomness(config.seed), _cut_texts(model, config.max_tokens), Interrupt() as stop:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=_arguments(model, config, checkpoints),
            train_dataset=Dataset.from_dict(columns),
            loss=loss,
        )
        watch = _Watch(loss, stop, on_step, _seconds_of(checkpoint))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()
    return Trained(
        steps=trainer.state.global_step,
        seconds=round(watch.seconds, 1),
        interrupted=trainer.state.global_step < config.steps,
        curve=[_parts(entry) for entry in trainer.state.log_history if "loss" in entry],
    )


def _arguments(
    model: SentenceTransformer, config: EmbedConfig, folder: Path
) -> SentenceTransformerTrainingArguments:
    ranking = config.loss == "ranking"
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        warmup_steps=round(config.warmup * config.steps),
        max_grad_norm=config.max_grad_norm,
        # An equal text in a batch would be a negative of itself.
        batch_sampler=BatchSamplers.NO_DUPLICATES if ranking else BatchSamplers.BATCH_SAMPLER,
        seed=config.seed,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        dataloader_drop_last=True,
    )


def _seconds_of(checkpoint: str | None) -> float:
    """How long the training took that left a checkpoint."""
    if checkpoint is None:
        return 0.0
    return float((Path(checkpoint) / SECONDS).read_text(encoding="utf-8"))


def _checkpoint(folder: Path, resume: bool) -> str | None:
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise TrainingError(f"no checkpoint in {folder}: start without --resume")
    return str(found)


@contextmanager
def _cut_texts(model: SentenceTransformer, tokens: int | None) -> Iterator[None]:
    """Read only the first `tokens` of a text; the model's own limit comes back afterwards."""
    before = model.max_seq_length
    try:
        if tokens is not None:
            model.max_seq_length = tokens if before is None else min(tokens, before)
        yield
    finally:
        model.max_seq_length = before


def _parts(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of a log entry that are losses, and the step."""
    others = ("epoch", "learning_rate", "grad_norm", "total_flos")
    return {name: float(value) for name, value in entry.items() if name not in others}


class _Watch(TrainerCallback):
    """Reports steps, ends the run on request, and takes a resumed loss to its step."""

    def __init__(
        self, loss: nn.Module, stop: Interrupt, on_step: OnStep | None, before: float
    ) -> None:
        self.loss, self.stop, self.on_step, self.before = loss, stop, on_step, before
        self.started, self.first = time.perf_counter(), 0
        self.latest: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """From the start, earlier parts of a resumed training counted in."""
        return self.before + time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first = time.perf_counter(), state.global_step
        if isinstance(self.loss, LadderLoss):
            self.loss.step = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (checkpoint / SECONDS).write_text(str(self.seconds), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs = given.get("logs") or {}
        if "loss" not in logs:
            return
        self.latest = _parts(logs)
        if self.latest["loss"] != self.latest["loss"]:
            raise TrainingError(
                f"the loss is no number at step {state.global_step}: start anew with a smaller lr"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stop.agreed(args.device):
            control.should_training_stop = control.should_save = True
        if self.on_step is None:
            return
        seconds, done = time.perf_counter() - self.started, state.global_step - self.first
        parts = dict(self.latest)
        self.on_step(
            Step(
                step=state.global_step,
                steps=state.max_steps,
                loss=parts.pop("loss", float("nan")),
                parts=parts,
                seconds=self.seconds,
                seconds_left=seconds / done * (state.max_steps - state.global_step),
            )
        )
