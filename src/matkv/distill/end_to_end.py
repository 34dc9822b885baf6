"""The end-to-end stage: transformers' Trainer around the student.

accelerate launch and torchrun run it on many devices. What is learned is small, so a checkpoint
holds the bases, the adapters and the optimizer's state, and never the model.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.import_utils import is_accelerate_available

from matkv.bases.learned import ADAM_EPSILON
from matkv.data.batch import Batch
from matkv.distill.checkpoints import check_same_run, like, seal, whole
from matkv.distill.config import DistillConfig
from matkv.distill.examples import TrainingSet, collate
from matkv.distill.student import Student
from matkv.errors import TrainingError
from matkv.files import save_tensors
from matkv.progress import CurvePoint, Interrupt, OnProgress, Report, Spent, own_randomness
from matkv.schedule import Sizes

LEARNED, RUN = "learned.safetensors", "run.json"
LOSS_AT = "loss at "  # a budget follows: how probes are logged
UNLIMITED = 1_000_000  # steps of a run that only the clock ends


def training_arguments(
    config: DistillConfig, device: torch.device, folder: Path, *, save: bool
) -> TrainingArguments:
    """The Trainer's settings; making them joins the process group that a launcher announces.

    Raises:
        TrainingError: the batch does not divide by processes and micro-batches, or the package
            accelerate is not installed.
    """
    if not is_accelerate_available():
        raise TrainingError("training needs the package accelerate: pip install accelerate")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.step_limit or UNLIMITED,
        max_grad_norm=config.max_grad_norm,
        save_strategy="steps" if save else "no",
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        logging_steps=config.probe.every,
        logging_nan_inf_filter=False,
        report_to=list(config.trackers),
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        seed=config.seed,
        use_cpu=device.type == "cpu",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process drives one device
    share, rest = divmod(config.batch_size, arguments.world_size)
    micro = config.micro_batch_size or share
    if rest or share % micro:
        raise TrainingError(
            f"batch_size {config.batch_size} does not divide into {arguments.world_size} processes "
            f"times micro_batch_size {micro}"
        )
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = share // micro
    return arguments


class DistillTrainer(Trainer):
    """Trains a `Student`: bases and adapters at their own learning rates, losses checked.

    `seconds` counts the time of earlier parts of a resumed run too. `earlier` says what stages
    before this one have used; checkpoints keep it.
    """

    def __init__(
        self,
        student: Student,
        data: TrainingSet,
        config: DistillConfig,
        args: TrainingArguments,
        earlier: dict[str, Any],
    ) -> None:
        with own_randomness(config.seed):
            super().__init__(model=student, args=args, train_dataset=data, data_collator=collate)
        self.remove_callback(PrinterCallback)
        self.student, self.config, self.data, self.earlier = student, config, data, earlier
        self.step_loss = 0.0
        self.seconds_before, self.started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(self.data)  # the training set has shuffled already

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        learned = (model or self.student).named_parameters()
        bases: list[nn.Parameter] = []
        adapters: list[nn.Parameter] = []
        for name, parameter in learned:
            if parameter.requires_grad:
                (bases if "bases." in name else adapters).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": bases, "lr": self.config.lr, "eps": ADAM_EPSILON}
        ]
        if adapters:
            groups.append({"params": adapters, "lr": self.config.lora.lr})
        self.optimizer = torch.optim.Adam(groups)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        # A plain function: one with a __dict__ would be written into the checkpoint.
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self._lr_factor(step)
        )
        return self.lr_scheduler

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero at the limit of steps or of time."""
        warmup = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, self.fraction(step))))

    def fraction(self, step: int) -> float:
        """How much of the run is over after `step` steps."""
        by_steps = step / self.args.max_steps
        if self.config.minutes is None:
            return by_steps
        return max(by_steps, largest(self.seconds, self.args.device) / (60 * self.config.minutes))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        if not bool(mean.isfinite()):
            step = self.state.global_step + 1
            raise TrainingError(
                f"the loss is {float(mean)} at step {step}: start anew with a smaller lr "
                "(the last checkpoint is from before, and good)"
            )
        self.step_loss += float(mean)
        return loss

    # ---- checkpoints

    def _save_checkpoint(self, *inputs: Any, **options: Any) -> None:
        super()._save_checkpoint(*inputs, **options)
        if dist.is_initialized():
            dist.barrier()  # every process has written its part
        if self.args.should_save:
            seal(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        learned = {name: whole(p) for name, p in self.student.named_parameters() if p.requires_grad}
        if not self.args.should_save or output_dir is None:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(learned, folder / LEARNED)
        run = {
            "config": self.config.to_json(),
            "start": self.student.bases.start,
            "seconds": self.seconds,
            "earlier": self.earlier,
        }
        (folder / RUN).write_text(json.dumps(run, indent=1), encoding="utf-8")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        check_same_run(self.config, self.student.bases.start, run)
        self.seconds_before, self.started = float(run["seconds"]), time.perf_counter()
        self.earlier = run["earlier"]
        learned = load_file(folder / LEARNED)
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(like(learned[name], parameter))


class Watch(TrainerCallback):
    """Reports every step, probes now and then, and ends the run by the clock or on request."""

    def __init__(
        self,
        trainer: DistillTrainer,
        interrupt: Interrupt,
        probe: Probe | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.trainer, self.interrupt = trainer, interrupt
        self.probe, steps = probe, trainer.config.step_limit
        self.report = Report(on_progress, "end-to-end", steps, "steps")
        self.tokens = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.tokens = sum(self.trainer.data.tokens(step) for step in range(state.global_step))

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        self.tokens += trainer.data.tokens(step - 1)
        fraction = trainer.fraction(step)
        if fraction >= 1 or self.interrupt.agreed(args.device):
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
        probes: dict[float, float] = {}
        if self.probe is not None and step % trainer.config.probe.every == 0:
            probes = self.probe.measure(trainer.student)
        loss, trainer.step_loss = trainer.step_loss, 0.0
        if probes:
            at = {f"{LOSS_AT}{budget:g}": value for budget, value in probes.items()}
            trainer.log({"tokens": self.tokens, "seconds": trainer.seconds, "step_loss": loss} | at)
        if state.is_world_process_zero:
            seconds = trainer.seconds
            self.report(
                step,
                f"loss {loss:.3f}",
                seconds=seconds,
                seconds_left=seconds / fraction * (1 - fraction) if fraction else None,
                figures={"loss": loss, "tokens": self.tokens},
                probes=probes,
            )


@dataclass(frozen=True)
class Probe:
    """Held-out sequences and the uniform budgets to measure the loss at."""

    batch: Batch
    rungs: dict[float, Sizes]

    @torch.no_grad()
    def measure(self, student: Student) -> dict[float, float]:
        """Loss a token at every budget."""
        device = next(student.parameters()).device
        sizes_KX = torch.tensor(list(self.rungs.values()))
        sizes_BKX = sizes_KX.expand(len(self.batch.ids_BT), -1, -1)
        loss_K, count = student.losses(self.batch.to(device), sizes_BKX.to(device))
        return dict(zip(self.rungs, (loss_K / max(1, count)).tolist(), strict=True))


def train_end_to_end(
    trainer: DistillTrainer,
    interrupt: Interrupt,
    *,
    resume_from: Path | None = None,
    probe: Probe | None = None,
    on_progress: OnProgress | None = None,
) -> Spent:
    """Run the Trainer until steps, tokens or minutes are used up, or Ctrl-C asks to stop.

    Raises:
        TrainingError: the loss is not a finite number, or the checkpoint is of another run.
    """
    watch = Watch(trainer, interrupt, probe, on_progress)
    trainer.add_callback(watch)
    with trainer.student.attending(), own_randomness(trainer.config.seed):
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    curve = tuple(_point(entry) for entry in trainer.state.log_history if "step_loss" in entry)
    return Spent(trainer.state.global_step, watch.tokens, trainer.seconds, curve)


def _point(entry: dict[str, Any]) -> CurvePoint:
    """A logged probe; the Trainer's checkpoints keep the log, so a resumed run has all of them."""
    return CurvePoint(
        step=int(entry["step"]),
        tokens=int(entry["tokens"]),
        seconds=round(entry["seconds"], 1),
        loss=entry["step_loss"],
        probes={
            name.removeprefix(LOSS_AT): value
            for name, value in entry.items()
            if name.startswith(LOSS_AT)
        },
    )


def largest(value: float, device: torch.device) -> float:
    """The largest value any process has; all must call this together."""
    if not dist.is_initialized():
        return value
    values = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return float(values)
