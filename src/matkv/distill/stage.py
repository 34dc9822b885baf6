"""Distill: train the bases of an artifact so that every budget keeps more of the model.

Shapes: B sequence, G KV head, T token, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Distilled
from matkv.artifact.lora import Lora
from matkv.bases.maps import SideBases
from matkv.bases.quantizer import Quantizer
from matkv.distill.adapters import Adapters
from matkv.distill.bases import Bases, rank_axes, sizes_of
from matkv.distill.checkpoints import last_checkpoint, remove_checkpoints
from matkv.distill.coded import Coding, level_axes
from matkv.distill.config import DistillConfig, check_stored
from matkv.distill.end_to_end import DistillTrainer, Probe, train_end_to_end, training_arguments
from matkv.distill.examples import Examples, TrainingSet, as_batch, as_example, longest_of
from matkv.distill.local import fit_locally, recorded_nbytes
from matkv.distill.student import Student, check_head
from matkv.errors import TrainingError
from matkv.hf.geometry import geometry_of
from matkv.hf.memory import check_fits
from matkv.hf.observe import collect_moments, fit_quantizers, measure_energy
from matkv.hf.weights import fingerprint
from matkv.progress import Interrupt, OnProgress, Spent, own_randomness
from matkv.ranks import SIDES, Side
from matkv.schedule import Axis, Schedule, uniform_rungs

PROBE_SEQUENCES = 2
CODED_SEQUENCES = 16  # whose latents the scales and steps of codes are fitted to


def distill(
    model: PreTrainedModel,
    artifact: Artifact,
    examples: Examples,
    config: DistillConfig,
    *,
    held_out: Examples | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    on_progress: OnProgress | None = None,
) -> Artifact:
    """Train the bases of `artifact` on `examples`; returns a new artifact (arXiv 2410.14731, §4).

    `examples` are windows of text [NT], or sequences {"input_ids": [T], "labels": [T]} whose labels
    are -100 where nothing is to be learned. The loss at three budgets is measured on the first of
    `held_out`. With a folder for `checkpoints`, `resume` goes on from the newest one, exactly;
    without `resume`, older ones there are removed. A first Ctrl-C ends the run after the step under
    way and keeps what was learned. Rank tables found for the old bases are dropped, unless
    the rungs are these tables (`adaptive`).

    Raises:
        FingerprintError: the artifact was made for another model.
        DataError: there is no example.
        TrainingError: settings do not fit, or the loss is not a finite number.
    """
    artifact.check(geometry_of(model.config), fingerprint(model))
    if artifact.lora is not None:
        raise TrainingError("the artifact has adapters already: start from the one before it")
    recent = artifact.recent if config.recent is None else config.recent
    _check_recent(recent, longest_of(examples))
    resume_from = last_checkpoint(checkpoints) if resume and checkpoints else None
    with TemporaryDirectory() as spare, _borrowed(model, config), Interrupt() as interrupt:
        folder = checkpoints or Path(spare)
        arguments = training_arguments(config, model.device, folder, save=folder is checkpoints)
        if not resume and arguments.should_save:
            remove_checkpoints(folder)
        model.to(arguments.device)  # type: ignore[arg-type]
        bases = Bases(artifact, config.parametrization).to(arguments.device)
        run = _Run(model, artifact, config, bases, recent, interrupt, on_progress)
        run.check_memory(longest_of(examples), arguments)
        if config.trains_locally and resume_from is None:
            run.local(examples)
        if config.trains_end_to_end and not interrupt.requested:
            run.end_to_end(examples, held_out, arguments, resume_from)
        return run.result(examples, held_out)


@dataclass
class _Run:
    """One distillation under way: what the stages share, and what they have done."""

    model: PreTrainedModel
    artifact: Artifact
    config: DistillConfig
    bases: Bases
    recent: int
    interrupt: Interrupt
    on_progress: OnProgress | None
    lora: Lora | None = None
    done: dict[str, Spent] = field(default_factory=dict)

    def check_memory(self, tokens: int, arguments: TrainingArguments) -> None:
        """Make sure that sequences of so many tokens fit in memory, as many as go together.

        Raises:
            TrainingError: what every layer keeps of them alone is more than there is.
        """
        config, device, local = self.config, self.model.device, self.config.local
        if config.trains_locally:
            nbytes = (
                local.batch_size
                * tokens
                * recorded_nbytes(self.artifact.geometry, self.model.dtype)
            )
            check_fits(nbytes, device, f"local_batch_size {local.batch_size}", TrainingError)
        if config.trains_end_to_end:
            text = self.model.config.get_text_config(decoder=True)
            micro = arguments.per_device_train_batch_size
            draws = len(self._schedule().draw(0, torch.Generator()))
            states = text.num_hidden_layers * text.hidden_size * self.model.dtype.itemsize
            what = f"a micro batch of {micro} sequences at {draws} draws of ranks"
            check_fits(micro * draws * tokens * states, device, what, TrainingError)

    def local(self, examples: Examples) -> None:
        config = self.config
        data = self._data(examples, config.local.batch_size, config.local.steps)
        spent = fit_locally(
            self.model,
            self.bases,
            data,
            config,
            recent=self.recent,
            interrupt=self.interrupt,
            on_progress=self.on_progress,
        )
        self.done["local"] = spent

    def end_to_end(
        self,
        examples: Examples,
        held_out: Examples | None,
        arguments: TrainingArguments,
        resume_from: Path | None,
    ) -> None:
        config = self.config
        check_head(self.model)
        adapters = self._adapters()
        try:
            student = Student(
                self.model,
                self.bases,
                config,
                adapters,
                recent=self.recent,
                sink=self.artifact.sink,
                coding=self._coding(examples),
            )
            data = self._data(examples, config.batch_size, arguments.max_steps)
            earlier = {name: spent.to_json() for name, spent in self.done.items()}
            trainer = DistillTrainer(student, data, config, arguments, earlier)
            spent = train_end_to_end(
                trainer,
                self.interrupt,
                resume_from=resume_from,
                probe=self._probe(held_out),
                on_progress=self.on_progress,
            )
            self.lora = adapters.export() if adapters else None
        finally:
            if adapters:
                adapters.remove()
        self.done = {name: Spent.from_json(one) for name, one in trainer.earlier.items()}
        self.done["end-to-end"] = spent

    def result(self, examples: Examples, held_out: Examples | None) -> Artifact:
        """The artifact with what was learned."""
        maps = self.bases.export()
        sequences = _first(held_out if held_out is not None else examples)
        energy = measure_energy(self.model, maps, sequences)
        quantizers: dict[tuple[int, Side], Quantizer] = {}
        if self.config.codes:
            seen = _spread(examples, CODED_SEQUENCES)
            quantizers = fit_quantizers(self.model, maps, seen, sink=self.artifact.sink)
        bases = {
            layer: {
                side: SideBases(sides[side], energy[layer, side], quantizers.get((layer, side)))
                for side in SIDES
            }
            for layer, sides in maps.items()
        }
        keeps_tables = self.config.adaptive or self.config.codes
        tables = self.artifact.tables if keeps_tables else {}
        made = replace(
            self.artifact, bases=bases, tables=tables, lora=self.lora, recent=self.recent
        )
        entry = Distilled(
            stages=self.done,
            interrupted=self.interrupt.requested,
            schedule=self._schedule(),
            settings=self.config.to_json(),
        )
        return made.with_history(entry)

    def _adapters(self) -> Adapters | None:
        with own_randomness(self.config.seed):
            return Adapters(self.model, self.config.lora) if self.config.lora.rank else None

    def _coding(self, examples: Examples) -> Coding | None:
        """The stored tables as levels, and what their codes follow from."""
        if not self.config.codes:
            return None
        tables, budgets = self.artifact.tables, self.config.rungs
        check_stored(budgets, tables, "codes")
        places = self.bases.heads
        quantizers = {place: self.artifact.quantizer(*place) for place in places}
        moments, _ = collect_moments(
            self.model, [one["input_ids"][None] for one in _spread(examples, CODED_SEQUENCES)]
        )
        by_place = {(layer, side): getattr(moments[layer], side) for layer, side in places}
        return Coding([tables[budget] for budget in budgets], quantizers, by_place)

    def _axes(self) -> tuple[Axis, ...]:
        if self.config.codes:
            return level_axes(self.artifact, self.config.rungs)
        return rank_axes(self.artifact.geometry, self.config.rank_step)

    def _schedule(self) -> Schedule:
        tables = {}
        if self.config.adaptive:
            tables = {budget: sizes_of(table) for budget, table in self.artifact.tables.items()}
        return self.config.make_schedule(self._axes(), tables)

    def _data(self, examples: Examples, batch_size: int, steps: int) -> TrainingSet:
        return TrainingSet(
            examples,
            self._schedule(),
            batch_size=batch_size,
            steps=steps,
            draw=self.config.draw,
            seed=self.config.seed,
        )

    def _probe(self, held_out: Examples | None) -> Probe | None:
        if held_out is None:
            return None
        axes, budgets = self._axes(), self.config.probe.budgets
        if self.config.codes:
            budgets = self.config.rungs
            rungs = {one: (level,) * len(axes) for level, one in enumerate(budgets, 1)}
            return Probe(as_batch(_first(held_out)), rungs)
        rungs = dict(zip(budgets, uniform_rungs(axes, budgets), strict=True))
        return Probe(as_batch(_first(held_out)), rungs)


def _check_recent(recent: int, longest: int) -> None:
    """Make sure that some token is truncated, so that there is something to learn."""
    if recent and 0 < longest <= recent + 1:
        raise TrainingError(
            f"recent {recent} keeps all of every sequence exact, the longest has {longest} tokens: "
            "give longer sequences or a smaller recent"
        )


def _first(examples: Examples, count: int = PROBE_SEQUENCES) -> list[dict[str, Tensor]]:
    return [as_example(examples[index]) for index in range(min(count, len(examples)))]


def _spread(examples: Examples, count: int) -> list[dict[str, Tensor]]:
    """So many examples from all of them: the first may be all of one kind."""
    places = torch.linspace(0, len(examples) - 1, min(count, len(examples))).long().tolist()
    return [as_example(examples[index]) for index in places]


@contextmanager
def _borrowed(model: PreTrainedModel, config: DistillConfig) -> Iterator[None]:
    """Freeze the model, and checkpoint its layers if wanted; give it back as it was."""
    training = model.training
    learned = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if config.gradient_checkpointing:
        # The model's own switch would also make the embeddings require gradients, for good.
        for layer in layers:
            layer.gradient_checkpointing = True
            run_again: Any = partial(checkpoint, use_reentrant=False)
            layer._gradient_checkpointing_func = run_again
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False
        model.train(training)
        for parameter, learns in learned:
            parameter.requires_grad_(learns)
