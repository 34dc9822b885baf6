"""The loss over a ladder: what it equals, what it trains, and what it refuses.

Shapes: B text, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses, modules
from torch import Tensor, nn
from torch.nn import functional as F

from matkv.embeddings import LadderLoss, Size, ladder, truncate
from matkv.embeddings.rungs import size_axes
from matkv.embeddings.serve import trained_sizes
from matkv.errors import SizeError, TrainingError, UnsupportedModelError
from matkv.schedule import Axis, Cycle, Independent, Ladder, Sandwich, Schedule
from tiny_embedders import ARCHITECTURES, HIDDEN, LAYERS, TEXTS, build, features

FULL = (LAYERS, HIDDEN)
RUNGS = ((1, 8), (2, 16), FULL)
TRIPLETS = (TEXTS[:3], TEXTS[1:4], TEXTS[2:])
Base = Callable[[SentenceTransformer], nn.Module]


class Keeps(nn.Module):
    """A base loss that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Tensor]] = []

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        self.seen.append(embeddings)
        return torch.stack([u_BD.square().mean() for u_BD in embeddings]).sum()


def scores(*values: float) -> Tensor:
    return torch.tensor(values)


BASES: dict[str, tuple[Base, int, Tensor | None]] = {
    "ranking of pairs": (losses.MultipleNegativesRankingLoss, 2, None),
    "ranking of triplets": (losses.MultipleNegativesRankingLoss, 3, None),
    "cosent": (losses.CoSENTLoss, 2, scores(0.1, 0.9, 0.4)),
    "angle": (losses.AnglELoss, 2, scores(0.1, 0.9, 0.4)),
    "cosine": (losses.CosineSimilarityLoss, 2, scores(0.1, 0.9, 0.4)),
    "triplet": (losses.TripletLoss, 3, None),
    "contrastive": (losses.ContrastiveLoss, 2, torch.tensor([0, 1, 1])),
    "margin": (losses.MarginMSELoss, 3, scores(0.1, 0.9, 0.4)),
    "orthogonal": (losses.GlobalOrthogonalRegularizationLoss, 2, None),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_full_size_alone_is_the_base_loss_bit_for_bit(name: str, training: bool) -> None:
    make, columns, labels = BASES[name]
    model = build("bert", modules.Normalize()).train(training)
    base = make(model)
    values, gradients = [], []
    for loss in (base, LadderLoss(model, base, ladder(model, [FULL]))):
        model.zero_grad()
        torch.manual_seed(0)  # dropout
        value = loss(features(model, *TRIPLETS[:columns]), labels)
        total = torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
        total.backward()
        values.append(total.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(*values)
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_trained_is_what_is_served(name: str) -> None:
    model = build(name, modules.Normalize())
    base = Keeps()
    with torch.no_grad():
        LadderLoss(model, base, ladder(model, RUNGS))(features(model, TEXTS), None)
    for (layer, dim), (u_BD,) in zip(RUNGS, base.seen, strict=True):
        assert np.array_equal(u_BD.numpy(), truncate(model, layer, dim).encode(TEXTS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_above_a_size_get_no_gradient_from_it(name: str) -> None:
    model = build(name)
    layers = model[0].model.get_submodule(
        "encoder.layer" if name in ("bert", "mpnet") else "layers"
    )
    parts = LadderLoss(model, Keeps(), ladder(model, RUNGS))(features(model, TEXTS), None)
    for layer, dim in RUNGS:
        model.zero_grad()
        parts[f"{layer}x{dim}"].backward(retain_graph=True)
        reached = [any(_moved(p) for p in one.parameters()) for one in layers]
        assert reached == [index < layer for index in range(LAYERS)]


def _moved(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


@pytest.mark.parametrize("rungs", [[FULL], list(RUNGS)], ids=["one size", "three sizes"])
def test_a_column_goes_through_the_model_once_whatever_the_sizes(rungs: list[Size]) -> None:
    model = build("bert")
    loss = LadderLoss(model, losses.MultipleNegativesRankingLoss(model), ladder(model, rungs))
    passes: list[int] = []
    model[0].model.encoder.register_forward_hook(lambda *_: passes.append(1))
    loss(features(model, *TRIPLETS[:2]), None)
    assert len(passes) == 2


def test_nothing_above_the_highest_size_runs() -> None:
    model = build("bert")
    ran: list[int] = []
    for index, layer in enumerate(model[0].model.encoder.layer):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    loss = LadderLoss(model, Keeps(), ladder(model, [(1, 8), (2, 16)]))
    ran.clear()
    loss(features(model, TEXTS), None)
    assert ran == [0, 1]
    assert len(model[0].model.encoder.layer) == LAYERS


def test_the_parts_add_up_to_the_mean_over_the_sizes() -> None:
    model = build("bert")
    base = losses.MultipleNegativesRankingLoss(model)
    parts = LadderLoss(model, base, ladder(model, RUNGS))(features(model, *TRIPLETS), None)
    assert list(parts) == ["1x8", "2x16", "4x32"]
    alone = [
        LadderLoss(model, base, ladder(model, [rung]))(features(model, *TRIPLETS), None)
        for rung in RUNGS
    ]
    mean = torch.stack([value for one in alone for value in one.values()]).mean()
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(), mean)


# ---- schedules


def test_every_schedule_draws_its_own_sizes() -> None:
    model = build("bert")
    axes = size_axes(FULL, 8)

    def drawn(schedule: Schedule, steps: int = 4) -> list[list[str]]:
        loss = LadderLoss(model, Keeps(), schedule, seed=3)
        return [list(loss(features(model, TEXTS), None)) for _ in range(steps)]

    assert drawn(Ladder(axes, RUNGS), 2) == [["1x8", "2x16", "4x32"]] * 2
    assert drawn(Cycle(axes, RUNGS)) == [["1x8"], ["2x16"], ["4x32"], ["1x8"]]
    for names in drawn(Sandwich(axes, 2)):
        assert {"1x8", "4x32"} <= set(names)
        assert len(names) <= 4
    independent = drawn(Independent(axes), 8)
    assert all(len(names) == 1 for names in independent)
    assert len({names[0] for names in independent}) > 2
    assert independent == drawn(Independent(axes), 8)
    assert trained_sizes(model) == tuple((n, d) for n in range(1, 5) for d in range(8, 33, 8))


def test_a_size_drawn_twice_counts_twice() -> None:
    model = build("bert")
    axes = (Axis("layer", LAYERS, LAYERS), Axis("dim", HIDDEN, HIDDEN))  # one size only
    parts = LadderLoss(model, Keeps(), Sandwich(axes, 3))(features(model, TEXTS), None)
    alone = LadderLoss(model, Keeps(), ladder(model, [FULL]))(features(model, TEXTS), None)
    assert parts.keys() == alone.keys() == {"4x32"}
    assert torch.equal(parts["4x32"], alone["4x32"])


def test_the_draw_depends_on_the_step_alone_and_evaluation_takes_no_step() -> None:
    model = build("bert")
    loss = LadderLoss(model, Keeps(), Independent(size_axes(FULL)), seed=1)
    with torch.no_grad():
        loss(features(model, TEXTS), None)
    assert loss.step == 0
    assert not trained_sizes(model)
    loss(features(model, TEXTS), None)
    assert loss.step == 1
    resumed = LadderLoss(model, Keeps(), Independent(size_axes(FULL)), seed=1)
    assert resumed.draw(7) == loss.draw(7)
    assert len({tuple(loss.draw(step)) for step in range(20)}) > 5
    other = LadderLoss(model, Keeps(), Independent(size_axes(FULL)), seed=2)
    assert [other.draw(step) for step in range(5)] != [loss.draw(step) for step in range(5)]


def test_sizes_are_recorded_once_they_are_trained() -> None:
    model = build("bert")
    loss = LadderLoss(model, Keeps(), ladder(model, RUNGS))
    assert not trained_sizes(model)
    loss(features(model, TEXTS), None)
    assert trained_sizes(model) == RUNGS
    assert model[0].model.config.matryoshka_dimensions == [HIDDEN]


# ---- distillation


def test_candidates_are_distilled_as_the_formula_says() -> None:
    model = build("bert")
    base = losses.MultipleNegativesRankingLoss(model, scale=7.0)
    loss = LadderLoss(model, base, ladder(model, RUNGS), distill=0.5)
    parts = loss(features(model, *TRIPLETS), None)
    found = {size: _columns(model, size) for size in RUNGS}

    def scores_of(size: Size) -> Tensor:
        first, *others = (F.normalize(u_BD, dim=-1) for u_BD in found[size])
        return 7.0 * first @ torch.cat(others).T

    teacher = scores_of(FULL).softmax(-1)
    total = torch.stack(
        [
            (teacher * (teacher.log() - scores_of(size).log_softmax(-1))).sum(-1).mean()
            for size in RUNGS[:-1]
        ]
    ).sum()
    torch.testing.assert_close(parts["distill"].detach(), 0.5 * total / len(RUNGS))


def test_coordinates_are_distilled_as_the_formula_says() -> None:
    model = build("bert", modules.Normalize())
    bare = SentenceTransformer(modules=list(model)[:2], device="cpu")  # not normalized
    loss = LadderLoss(model, Keeps(), ladder(model, RUNGS), distill=0.3, distill_over="coordinates")
    parts = loss(features(model, *TRIPLETS), None)
    whole = _columns(bare, FULL)
    total = torch.zeros(())
    for size in RUNGS[:-1]:
        for teacher_BD, v_BD in zip(whole, _columns(bare, size), strict=True):
            q_BD = teacher_BD[:, : size[1]].softmax(-1)
            total += (q_BD * (q_BD.log() - v_BD.log_softmax(-1))).sum(-1).mean() / len(whole)
    torch.testing.assert_close(parts["distill"].detach(), 0.3 * total / len(RUNGS))


def _columns(model: SentenceTransformer, size: Size) -> list[Tensor]:
    small = truncate(model, *size)
    return [torch.tensor(small.encode(column)) for column in TRIPLETS]


@pytest.mark.parametrize("over", ["candidates", "coordinates"])
def test_the_teacher_gets_no_gradient(over: Any) -> None:
    model = build("bert")
    base = losses.MultipleNegativesRankingLoss(model)
    loss = LadderLoss(model, base, ladder(model, RUNGS), distill=1.0, distill_over=over)
    loss(features(model, *TRIPLETS), None)["distill"].backward()
    layers = model[0].model.encoder.layer
    assert [any(_moved(p) for p in one.parameters()) for one in layers] == [
        True,
        True,
        False,
        False,
    ]


def test_scored_pairs_are_distilled_over_all_seconds_of_the_batch() -> None:
    model = build("bert")
    loss = LadderLoss(model, losses.CoSENTLoss(model), ladder(model, RUNGS), distill=1.0)
    parts = loss(features(model, *TRIPLETS[:2]), scores(0.1, 0.9, 0.4))
    assert float(parts["distill"].detach()) > 0


# ---- what is refused


def test_a_base_loss_without_the_seam_is_refused_by_name() -> None:
    model = build("bert")
    for base in (
        losses.CachedMultipleNegativesRankingLoss(model),
        losses.GISTEmbedLoss(model, model),
        losses.SoftmaxLoss(model, HIDDEN, num_labels=3),
        losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), [8, 32]),
    ):
        with pytest.raises(TrainingError, match=f"{type(base).__name__} cannot be computed"):
            LadderLoss(model, base, ladder(model))


def test_a_loss_or_a_schedule_of_another_model_is_refused() -> None:
    model = build("bert")
    with pytest.raises(TrainingError, match="CoSENTLoss was made for another model"):
        LadderLoss(model, losses.CoSENTLoss(build("bert")), ladder(model))
    with pytest.raises(TrainingError, match="the schedule is over 6x384, the model has 4x32"):
        LadderLoss(model, Keeps(), Ladder(size_axes((6, 384)), ((1, 8),)))
    with pytest.raises(TrainingError, match="the schedule is over 4, the model has 4x32"):
        LadderLoss(model, Keeps(), Ladder((Axis("layer", 4, 1),), ((1,),)))
    with pytest.raises(SizeError, match=r"layer 0 of 0x8 must be in 1\.\.4"):
        LadderLoss(model, Keeps(), Ladder(size_axes(FULL), ((0, 8),)))
    with pytest.raises(UnsupportedModelError):
        LadderLoss(build("albert"), Keeps(), Ladder(size_axes(FULL), (FULL,)))


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (Ladder(size_axes(FULL), ((1, 8), (2, 16))), {}, "distill needs the full size 4x32"),
        (Cycle(size_axes(FULL), RUNGS), {}, "distill needs the full size 4x32"),
        (Ladder(size_axes(FULL), RUNGS), {}, "Keeps has no scale and similarity"),
        (Ladder(size_axes(FULL), RUNGS), {"distill": -1.0}, "distill -1.0 must be 0 or more"),
        (
            Ladder(size_axes(FULL), RUNGS),
            {"distill_over": "layers"},
            "distill_over 'layers' must be one of candidates, coordinates",
        ),
    ],
)
def test_distillation_that_cannot_be_is_refused(
    schedule: Schedule, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        LadderLoss(build("bert"), Keeps(), schedule, **{"distill": 1.0} | options)


def test_distillation_of_a_random_draw_without_the_full_size_is_refused() -> None:
    model = build("bert")
    schedule = Independent(size_axes(FULL, HIDDEN))
    seed = next(s for s in range(99) if FULL in _drawn(model, schedule, s, 0))
    loss = LadderLoss(
        model, losses.MultipleNegativesRankingLoss(model), schedule, distill=1.0, seed=seed
    )
    loss.step = next(s for s in range(99) if FULL not in _drawn(model, schedule, seed, s))
    with pytest.raises(TrainingError, match="distill needs the full size"):
        loss(features(model, *TRIPLETS), None)


def _drawn(model: SentenceTransformer, schedule: Schedule, seed: int, step: int) -> set[Size]:
    return set(LadderLoss(model, Keeps(), schedule, seed=seed).draw(step))


def test_distilling_one_text_an_example_is_refused() -> None:
    model = build("bert")
    base = losses.MultipleNegativesRankingLoss(model)
    loss = LadderLoss(model, base, ladder(model, RUNGS), distill=1.0)
    base.compute_loss_from_embeddings = lambda columns, labels: columns[0].sum()
    with pytest.raises(TrainingError, match="at least two texts"):
        loss(features(model, TEXTS), None)


def test_the_card_gets_the_settings_and_the_paper() -> None:
    model = build("bert")
    loss = LadderLoss(model, losses.CoSENTLoss(model), ladder(model, RUNGS))
    config = loss.get_config_dict()
    assert config["loss"] == "CoSENTLoss"
    assert config["schedule"]["rungs"] == [list(rung) for rung in RUNGS]
    assert "2410.13230" in loss.citation
