"""The student, on tiny models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import matkv
from lessons import quick, text
from matkv.distill.bases import Bases, rank_axes, sizes_of
from matkv.distill.config import DistillConfig
from matkv.distill.examples import collate
from matkv.distill.losses import LossWeights
from matkv.distill.stage import _borrowed, distill
from matkv.distill.student import Student
from matkv.errors import UnsupportedModelError
from matkv.ranks import RankTable
from matkv.schedule import Independent, uniform_rungs
from tiny import Tiny


def student_of(tiny: Tiny, **weights: float) -> Student:
    return Student(tiny.model, Bases(tiny.artifact, "cayley"), LossWeights(**weights))


def batch_for(student: Student, tiny: Tiny, draws: int = 1) -> dict[str, Tensor]:
    axes = rank_axes(tiny.artifact.geometry)
    source = torch.Generator().manual_seed(3)
    items = []
    for ids_T in text(3):
        sizes = [Independent(axes).draw(0, source)[0] for _ in range(draws)]
        items.append({"input_ids": ids_T, "labels": ids_T, "sizes": torch.tensor(sizes)})
    return collate(items)


def test_the_student_attends_as_the_attached_model_does(family: Tiny) -> None:
    """At random ranks, before training, on every kind of model."""
    model, artifact = family.model, family.artifact
    full = RankTable.full(artifact.geometry)
    axes = rank_axes(artifact.geometry)
    sizes = Independent(axes).draw(0, torch.Generator().manual_seed(0))[0]
    cells = [(layer, side, head) for layer, side, head, _ in full.compressed_ranks()]
    table = full.changed(dict(zip(cells, sizes, strict=True)))
    assert sizes_of(table) == sizes
    ids_BT = text(2, 12)
    matkv.attach(model, artifact, ranks=table)
    with torch.no_grad():
        expected = model(ids_BT, use_cache=False).logits
    matkv.detach(model)
    student = Student(model, Bases(artifact, "cayley"), LossWeights())
    with student.attending(), torch.no_grad():
        student._project(torch.tensor([sizes]))
        found = model(ids_BT, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_student_keeps_as_many_tokens_exact_as_the_cache(llama: Tiny) -> None:
    model, artifact = llama.model, llama.artifact
    table, ids_BT = llama.ragged(), text(2, 24)
    matkv.attach(model, artifact, ranks=table, recent=5)
    with torch.no_grad():
        expected = model(ids_BT, use_cache=False).logits
    matkv.detach(model)
    student = Student(model, Bases(artifact, "cayley"), LossWeights(), recent=5)
    with student.attending(), torch.no_grad():
        student._project(torch.tensor([sizes_of(table)]))
        found = model(ids_BT, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_at_full_rank_the_untrained_student_is_the_teacher(llama: Tiny) -> None:
    student = student_of(llama)
    batch = batch_for(student, llama)
    axes = rank_axes(llama.artifact.geometry)
    batch["sizes"] = torch.tensor(uniform_rungs(axes, (1.0,))).expand(3, 1, -1)
    with student.attending():
        assert abs(float(student(**batch)["loss"].detach())) < 1e-5


def test_draws_of_one_batch_are_the_mean_of_draws_apart(llama: Tiny) -> None:
    student = student_of(llama)
    batch = batch_for(student, llama, draws=3)
    with student.attending():
        together = float(student(**batch)["loss"].detach())
        apart = [
            float(student(**batch | {"sizes": batch["sizes"][:, [k]]})["loss"].detach())
            for k in range(3)
        ]
    assert together == pytest.approx(sum(apart) / 3, rel=1e-5)


def test_padding_and_ignored_labels_change_nothing(llama: Tiny) -> None:
    student = student_of(llama)
    batch = batch_for(student, llama)
    batch["labels"] = batch["labels"].masked_fill(torch.arange(16) < 5, -100)
    longer = {
        "input_ids": F.pad(batch["input_ids"], (0, 4), value=7),
        "labels": F.pad(batch["labels"], (0, 4), value=-100),
        "attention_mask": F.pad(torch.ones(3, 16).long(), (0, 4)),
        "sizes": batch["sizes"],
    }
    with student.attending():
        expected, found = student(**batch)["loss"], student(**longer)["loss"]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def gradients(tiny: Tiny, config: DistillConfig) -> list[Tensor]:
    student = student_of(tiny).train()
    with _borrowed(tiny.model, config), student.attending():
        student.train()
        student(**batch_for(student, tiny, draws=2))["loss"].backward()
    return [
        parameter.grad for parameter in student.bases.parameters() if parameter.grad is not None
    ]


def test_gradient_checkpointing_gives_the_same_gradients(llama: Tiny) -> None:
    plain = gradients(llama, quick())
    saved = gradients(llama, quick(gradient_checkpointing=True))
    assert plain
    for ours, theirs in zip(plain, saved, strict=True):
        assert float(ours.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_a_model_that_scales_its_logits_is_refused(llama: Tiny) -> None:
    model = copy.deepcopy(llama.model)
    plain = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    model.forward = scaled
    with pytest.raises(UnsupportedModelError, match="scales or caps its logits"):
        distill(model, llama.artifact, text(), quick())
