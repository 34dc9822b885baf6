"""The end-to-end stage: exact resume, interrupts, probes and the clock."""

from __future__ import annotations

import copy
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lessons import quick, same_bases, text
from matkv.artifact.artifact import Artifact
from matkv.distill.checkpoints import last_checkpoint
from matkv.distill.stage import distill
from matkv.errors import TrainingError
from matkv.progress import Progress
from tiny import Tiny


def adapters_of(artifact: Artifact) -> dict[str, Tensor]:
    return {} if artifact.lora is None else artifact.lora.tensors


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "lora_dropout": 0.1}], ids=["", "lora"])
def test_resume_after_a_kill_is_exact(llama: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = quick(objective="both", micro_batch_size=2, **changes)
    whole = distill(llama.model, llama.artifact, text(), config)

    def kill(progress: Progress) -> None:
        if progress.stage == "end-to-end" and progress.done == 5:
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
        on_progress=lambda progress: steps.append(progress.done),
    )
    assert steps == [4, 5, 6]
    assert same_bases(rest, whole)
    assert (rest.lora is not None) == (whole.lora is not None) == ("lora_rank" in changes)
    assert adapters_of(rest).keys() == adapters_of(whole).keys()
    for name, tensor in adapters_of(whole).items():
        assert torch.equal(adapters_of(rest)[name], tensor)
    stages = rest.history[-1]["stages"]
    assert list(stages) == ["local", "end-to-end"]
    assert stages["end-to-end"]["tokens"] == 6 * 4 * 16
    finished = distill(
        llama.model, llama.artifact, text(), config, checkpoints=tmp_path, resume=True
    )
    assert same_bases(finished, whole)


def test_a_first_ctrl_c_saves_and_ends(llama: Tiny, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def press(progress: Progress) -> None:
        if progress.done == 2:
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
        if progress.done == 4:
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
    assert [report.done for report in reports if report.probes] == [3, 6]
    probes = reports[-1].probes
    assert list(probes) == [0.75, 0.5, 0.25]
    assert 0 < probes[0.75] < probes[0.5] < probes[0.25]


def test_the_curve_of_probes_survives_a_kill(llama: Tiny, tmp_path: Path) -> None:
    config = quick(probe_every=2, probe_budgets=(1.0, 0.5))

    def kill(progress: Progress) -> None:
        if progress.done == 5:
            raise RuntimeError("killed")

    train = (llama.model, llama.artifact, text(), config)
    with pytest.raises(RuntimeError, match="killed"):
        distill(*train, held_out=text(2), checkpoints=tmp_path, on_progress=kill)
    made = distill(*train, held_out=text(2), checkpoints=tmp_path, resume=True)
    curve = made.history[-1]["stages"]["end-to-end"]["curve"]
    assert [point["step"] for point in curve] == [2, 4, 6]
    assert [point["tokens"] for point in curve] == [128, 256, 384]
    assert all(point["probes"]["1"] < point["probes"]["0.5"] for point in curve)
