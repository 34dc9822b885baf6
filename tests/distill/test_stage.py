"""Distillation of a tiny model: what both stages learn, and what the artifact says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lessons import off_orthogonal, quick, same_bases, text
from matkv.artifact.artifact import Artifact
from matkv.bases.learned import PARAMETRIZATIONS, Parametrization
from matkv.data.batch import Batch
from matkv.distill.bases import Bases, rank_axes, sizes_of
from matkv.distill.losses import LossWeights
from matkv.distill.stage import distill
from matkv.distill.student import Student
from matkv.errors import TrainingError
from matkv.progress import Progress
from matkv.ranks import SIDES
from matkv.schedule import uniform_rungs
from tiny import Tiny


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("objective", ["local", "end-to-end", "both"])
def test_the_loss_falls(llama: Tiny, objective: str, recent: int) -> None:
    reports: list[Progress] = []
    config = quick(objective=objective, steps=30, local_steps=30, recent=recent)
    made = distill(llama.model, llama.artifact, text(), config, on_progress=reports.append)
    axes = rank_axes(llama.artifact.geometry)
    sizes = torch.tensor(uniform_rungs(axes, (0.5,))).expand(8, 1, -1)
    batch = Batch(text(8), labels_BT=text(8))
    losses = []
    for artifact in (llama.artifact, made):
        student = Student(llama.model, Bases(artifact, "cayley"), LossWeights(), recent=recent)
        with student.attending(), torch.no_grad():
            losses.append(float(student.losses(batch, sizes)[0]))
    assert losses[1] < 0.98 * losses[0]
    stages = ["local", "end-to-end"] if objective == "both" else [objective]
    assert [*dict.fromkeys(report.stage for report in reports)] == stages
    assert list(made.history[-1]["stages"]) == stages
    assert reports[-1].done == 30
    assert reports[-1].seconds_left == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_every_parametrization_trains_saves_and_loads(
    llama: Tiny, tmp_path: Path, kind: Parametrization
) -> None:
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    config = quick(parametrization=kind, objective="both", lr=3e-2)
    made = distill(llama.model, llama.artifact, text(), config)
    assert Artifact.load(made.save(tmp_path / "run")).history == made.history
    for layer in made.geometry.compressed:
        for side in SIDES:
            maps = Artifact.load(tmp_path / "run").maps(layer, side)
            assert not torch.equal(maps.encode_XDD, llama.artifact.maps(layer, side).encode_XDD)
            if kind != "free":
                assert off_orthogonal(maps) < 1e-5
            energy = made.bases[layer][side].energy_GD
            torch.testing.assert_close(energy.sum(-1), torch.ones(len(energy)))
    after = llama.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not llama.model.training


def test_a_run_is_decided_by_its_seed_and_leaves_global_randomness_alone(llama: Tiny) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = (
        distill(llama.model, llama.artifact, text(), quick(seed=seed, objective="both"))
        for seed in (0, 0, 1)
    )
    assert same_bases(one, again)
    assert not same_bases(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_adaptive_rungs_are_the_stored_tables_and_stay(llama: Tiny) -> None:
    artifact = replace(llama.artifact, tables={0.5: llama.ragged()})
    settings: dict[str, Any] = {"schedule": "cycle", "adaptive": True, "rungs": (0.5,)}
    made = distill(llama.model, artifact, text(), quick(**settings))
    assert made.tables == artifact.tables
    assert made.history[-1]["schedule"]["rungs"] == [list(sizes_of(llama.ragged()))]
    settings["adaptive"] = False
    assert not distill(llama.model, artifact, text(), quick(**settings)).tables
    with pytest.raises(TrainingError, match=r"no table for budgets 0\.25: run matkv allocate"):
        distill(llama.model, artifact, text(), quick(**settings | RUNGS))


RUNGS: dict[str, Any] = {"adaptive": True, "rungs": (0.5, 0.25)}


@pytest.mark.parametrize("objective", ["local", "end-to-end"])
def test_recent_tokens_are_trained_with_and_stored(llama: Tiny, objective: Any) -> None:
    plain, exact = (
        distill(llama.model, llama.artifact, text(), quick(objective=objective, recent=recent))
        for recent in (None, 4)
    )
    assert (plain.recent, exact.recent) == (0, 4)
    assert not same_bases(plain, exact)
    start = replace(llama.artifact, recent=4)
    again = distill(llama.model, start, text(), quick(objective=objective))
    assert same_bases(again, exact)


def test_recent_tokens_that_leave_nothing_to_learn_are_refused(llama: Tiny) -> None:
    with pytest.raises(TrainingError, match=r"recent 15 keeps all .* the longest has 16 tokens"):
        distill(llama.model, llama.artifact, text(), quick(recent=15))
    short = [{"input_ids": ids_T[:5], "labels": ids_T[:5]} for ids_T in text()]
    with pytest.raises(TrainingError, match="the longest has 5 tokens"):
        distill(llama.model, replace(llama.artifact, recent=4), short, quick(objective="local"))


def test_supervised_sequences_of_any_length_train(llama: Tiny) -> None:
    examples = [
        {
            "input_ids": ids_T[:length],
            "labels": ids_T[:length].masked_fill(torch.arange(length) < 4, -100),
        }
        for ids_T, length in zip(text(), [8, 12, 16, 10] * 10, strict=True)
    ]
    made = distill(llama.model, llama.artifact, examples, quick(objective="both"))
    assert not same_bases(made, llama.artifact)
    assert made.history[-1]["stages"]["end-to-end"]["tokens"] < 6 * 4 * 16
