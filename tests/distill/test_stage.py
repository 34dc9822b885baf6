"""Distillation: both stages, exact resume, interrupts and adapters, on a tiny model."""

from __future__ import annotations

import copy
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import matkv
from lessons import off_orthogonal, quick, same_bases, text
from matkv.artifact.artifact import Artifact
from matkv.bases.learned import PARAMETRIZATIONS, Parametrization
from matkv.data.batch import Batch
from matkv.distill.bases import Bases, rank_axes, sizes_of
from matkv.distill.checkpoints import last_checkpoint
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
    assert reports[-1].step == 30
    assert reports[-1].seconds_left == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_every_parametrization_trains_saves_and_loads(
    llama: Tiny, tmp_path: Path, kind: Parametrization
) -> None:
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    config = quick(parametrization=kind, objective="both", lr=3e-2)
    made = distill(llama.model, llama.artifact, text(), config)
    assert Artifact.load(made.save(tmp_path / "run")).history == made.history
    for layer in made.geometry.growing:
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


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "lora_dropout": 0.1}], ids=["", "lora"])
def test_resume_after_a_kill_is_exact(llama: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = quick(objective="both", micro_batch_size=2, **changes)
    whole = distill(llama.model, llama.artifact, text(), config)

    def kill(progress: Progress) -> None:
        if progress.stage == "end-to-end" and progress.step == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        distill(llama.model, llama.artifact, text(), config, checkpoints=tmp_path, on_progress=kill)
    newest = last_checkpoint(tmp_path)
    assert newest is not None and newest.name == "checkpoint-3"
    (tmp_path / "checkpoint-9").mkdir()  # what a kill in the middle of saving leaves
    steps: list[int] = []
    rest = distill(
        llama.model,
        llama.artifact,
        text(),
        config,
        checkpoints=tmp_path,
        resume=True,
        on_progress=lambda progress: steps.append(progress.step),
    )
    assert steps == [4, 5, 6]
    assert same_bases(rest, whole)
    if whole.lora is not None and rest.lora is not None:
        for name, tensor in whole.lora.tensors.items():
            assert torch.equal(rest.lora.tensors[name], tensor)
    stages = rest.history[-1]["stages"]
    assert list(stages) == ["local", "end-to-end"]
    assert stages["end-to-end"]["tokens"] == 6 * 4 * 16
    finished = distill(
        llama.model, llama.artifact, text(), config, checkpoints=tmp_path, resume=True
    )
    assert same_bases(finished, whole)


def test_other_settings_do_not_go_on_from_a_checkpoint(llama: Tiny, tmp_path: Path) -> None:
    distill(llama.model, llama.artifact, text(), quick(), checkpoints=tmp_path)
    with pytest.raises(TrainingError, match=r"lr 0\.01 \(now 0\.5\)"):
        distill(
            llama.model, llama.artifact, text(), quick(lr=0.5), checkpoints=tmp_path, resume=True
        )


def test_a_new_run_removes_checkpoints_of_an_older_one(llama: Tiny, tmp_path: Path) -> None:
    for steps in (9, 3):
        distill(llama.model, llama.artifact, text(), quick(steps=steps), checkpoints=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_first_ctrl_c_saves_and_ends(llama: Tiny, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def press(progress: Progress) -> None:
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    made = distill(
        llama.model, llama.artifact, text(), quick(), checkpoints=tmp_path, on_progress=press
    )
    assert made.history[-1]["interrupted"]
    assert made.history[-1]["stages"]["end-to-end"]["steps"] == 3
    assert last_checkpoint(tmp_path) is not None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    llama: Tiny, tmp_path: Path
) -> None:
    model = copy.deepcopy(llama.model)

    def poison(progress: Progress) -> None:
        if progress.step == 4:
            model.get_output_embeddings().weight.data.fill_(math.nan)

    with pytest.raises(TrainingError, match="nan at step 5"):
        distill(model, llama.artifact, text(), quick(), checkpoints=tmp_path, on_progress=poison)
    newest = last_checkpoint(tmp_path)
    assert newest is not None and newest.name == "checkpoint-3"


def test_the_clock_ends_a_run(llama: Tiny) -> None:
    config = quick(steps=None, minutes=0.01)
    stages = distill(llama.model, llama.artifact, text(), config).history[-1]["stages"]
    assert 1 <= stages["end-to-end"]["steps"] < 1000
    assert stages["end-to-end"]["minutes"] < 0.2


def test_probes_report_the_loss_at_three_budgets(llama: Tiny) -> None:
    reports: list[Progress] = []
    distill(
        llama.model,
        llama.artifact,
        text(),
        quick(),
        held_out=text(2),
        on_progress=reports.append,
    )
    assert [report.step for report in reports if report.probes] == [3, 6]
    probes = reports[-1].probes
    assert list(probes) == [0.75, 0.5, 0.25]
    assert 0 < probes[0.75] < probes[0.5] < probes[0.25]


def test_the_curve_of_probes_survives_a_kill(llama: Tiny, tmp_path: Path) -> None:
    config = quick(probe_every=2, probe_budgets=(1.0, 0.5))

    def kill(progress: Progress) -> None:
        if progress.step == 5:
            raise RuntimeError("killed")

    train = (llama.model, llama.artifact, text(), config)
    with pytest.raises(RuntimeError, match="killed"):
        distill(*train, held_out=text(2), checkpoints=tmp_path, on_progress=kill)
    made = distill(*train, held_out=text(2), checkpoints=tmp_path, resume=True)
    curve = made.history[-1]["stages"]["end-to-end"]["curve"]
    assert [point["step"] for point in curve] == [2, 4, 6]
    assert [point["tokens"] for point in curve] == [128, 256, 384]
    assert all(point["probes"]["1"] < point["probes"]["0.5"] for point in curve)


def test_adaptive_rungs_are_the_stored_tables_and_stay(llama: Tiny) -> None:
    artifact = replace(llama.artifact, tables={0.5: llama.ragged()})
    settings: dict[str, Any] = {"schedule": "cycle", "adaptive": True, "rungs": (0.5,)}
    made = distill(llama.model, artifact, text(), quick(**settings))
    assert made.tables == artifact.tables
    assert made.history[-1]["schedule"]["rungs"] == [list(sizes_of(llama.ragged()))]
    settings["adaptive"] = False
    assert not distill(llama.model, artifact, text(), quick(**settings)).tables
    with pytest.raises(TrainingError, match=r"no rank table for budgets 0\.25: run matkv allocate"):
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


def test_adapters_learn_with_the_bases_and_are_merged_at_attach(
    llama: Tiny, tmp_path: Path
) -> None:
    model, ids_BT = llama.model, text(2)
    config = quick(lora_rank=2, lora_lr=1e-2, steps=20, ce=1.0)
    made = distill(model, llama.artifact, text(), config)
    loaded = Artifact.load(made.save(tmp_path / "run"))
    assert made.lora is not None and loaded.lora is not None
    assert set(loaded.lora.tensors) == set(made.lora.tensors)
    with torch.no_grad():
        plain = model(ids_BT).logits
        for artifact in (loaded, loaded, llama.artifact):
            matkv.attach(model, artifact, 1.0)
            changed = float((model(ids_BT, use_cache=False).logits - plain).abs().max())
            assert (changed > 1e-3) == (artifact is loaded)
        matkv.detach(model)
        assert torch.equal(model(ids_BT).logits, plain)
    with pytest.raises(TrainingError, match="has adapters"):
        distill(model, loaded, text(), config)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_loads_the_adapters_of_an_artifact(llama: Tiny, tmp_path: Path) -> None:
    from peft import PeftModel

    made = distill(llama.model, llama.artifact, text(), quick(lora_rank=2, lora_lr=1e-2))
    made.save(tmp_path / "run")
    model, ids_BT = copy.deepcopy(llama.model), text(2)
    matkv.attach(model, made, 1.0)
    with torch.no_grad():
        merged = model(ids_BT, use_cache=False).logits
        matkv.detach(model)
        by_peft = PeftModel.from_pretrained(model, tmp_path / "run" / "lora")(ids_BT).logits
    torch.testing.assert_close(by_peft, merged, rtol=1e-4, atol=1e-4)


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
