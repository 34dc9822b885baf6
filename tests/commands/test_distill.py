"""`matkv distill`: a tiny training, cut off and resumed, and what it refuses."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lessons import same_bases
from matkv.artifact.artifact import Artifact
from matkv.progress import Progress
from program import Program, Word

RECIPE = """
sequence_length = 32
batch_size = 2
steps = 6
warmup_steps = 2
local_steps = 3
local_batch_size = 2
checkpoint_every = 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def asked(home: Path, run: Path, recipe: Path) -> list[Word]:
    return ["distill", run, "--config", recipe, "--text", home / "text.txt"]


def press_at(step: int, patch: pytest.MonkeyPatch, stage: str = "end-to-end") -> None:
    """Ctrl-C when a stage reports a step."""

    @contextmanager
    def line(label: str) -> Iterator[Callable[[Progress], None]]:
        def update(at: Progress) -> None:
            if at.stage == stage and at.done == step:
                signal.raise_signal(signal.SIGINT)

        yield update

    patch.setattr("matkv.commands.distill.progress_bar", line)


def checkpoints_of(run: Path) -> Path:
    return run.with_name(f".{run.name}.checkpoints")


def test_trained_bases_replace_the_runs(asked: list[Word], run: Path, matkv: Program) -> None:
    before = Artifact.load(run)
    report = matkv(*asked, "--objective", "both", "--lr", 0.02, "--json").json()
    after = Artifact.load(run)
    assert report == {"artifact": str(run), "history": after.history[-1]}
    assert not same_bases(before, after)
    assert after.history[:-1] == before.history
    entry = after.history[-1]
    assert entry["stage"] == "distill" and not entry["interrupted"]
    assert list(entry["stages"]) == ["local", "end-to-end"]
    assert entry["stages"]["end-to-end"]["steps"] == 6
    assert entry["stages"]["end-to-end"]["tokens"] == 6 * 2 * 32
    assert entry["settings"]["lr"] == 0.02  # the command line's before the recipe's
    assert entry["settings"]["sequence_length"] == 32
    assert not checkpoints_of(run).exists()


def test_another_artifact_with_adapters(
    asked: list[Word], run: Path, tmp_path: Path, matkv: Program
) -> None:
    before = (run / "bases.safetensors").read_bytes()
    out = tmp_path / "out"
    ended = matkv(*asked, "-o", out, "--lora-rank", 2, "--steps", 2)
    assert ended.code == 0, ended.err
    assert f"wrote {out}" in " ".join(ended.out.split())
    made = Artifact.load(out)
    assert made.lora is not None and made.lora.tensors
    assert all(torch.isfinite(tensor).all() for tensor in made.lora.tensors.values())
    assert (run / "bases.safetensors").read_bytes() == before


def test_chats_to_train_on(run: Path, recipe: Path, tmp_path: Path, matkv: Program) -> None:
    data = tmp_path / "chats.jsonl"
    pairs = [{"prompt": f"Which is {i}?", "response": f"It is number {i}."} for i in range(8)]
    data.write_text("\n".join(map(json.dumps, pairs)))
    report = matkv("distill", run, "--config", recipe, "--data", data, "--json").json()
    spent = report["history"]["stages"]["end-to-end"]
    assert spent["steps"] == 6 and 0 < spent["tokens"]


@pytest.mark.parametrize("name", ["run", "another"])
@pytest.mark.parametrize("changes", [["--objective", "both"], ["--lora-rank", "2"]])
def test_a_run_cut_off_goes_on_to_the_same_bases(
    asked: list[Word], tmp_path: Path, matkv: Program, changes: list[str], name: str
) -> None:
    asked = [*asked, *changes, "-o"]
    whole, cut = tmp_path / "whole", tmp_path / name
    assert matkv(*asked, whole).code == 0
    with pytest.MonkeyPatch.context() as patch:
        press_at(3, patch)
        ended = matkv(*asked, cut)
    assert ended.code == 130
    assert "interrupted" in ended.err and "--resume" in ended.err and not ended.out
    half = Artifact.load(cut)
    assert half.history[-1]["interrupted"]
    assert half.history[-1]["stages"]["end-to-end"]["steps"] < 6
    assert not same_bases(half, Artifact.load(whole))
    assert any(checkpoints_of(cut).iterdir())

    report = matkv(*asked, cut, "--resume", "--json").json()
    assert report["history"]["stages"]["end-to-end"]["steps"] == 6
    assert not report["history"]["interrupted"]
    assert same(Artifact.load(cut), Artifact.load(whole))
    assert not checkpoints_of(cut).exists()


def test_a_run_cut_off_in_its_first_stage_starts_anew_from_the_same_bases(
    asked: list[Word], run: Path, tmp_path: Path, matkv: Program
) -> None:
    asked = [*asked, "--objective", "both"]
    assert matkv(*asked, "-o", tmp_path / "whole").code == 0
    before = Artifact.load(run)
    with pytest.MonkeyPatch.context() as patch:
        press_at(2, patch, stage="local")
        assert matkv(*asked).code == 130
    half = Artifact.load(run)
    assert not same_bases(half, before)
    assert matkv(*asked, "--resume").code == 0
    made = Artifact.load(run)
    assert same(made, Artifact.load(tmp_path / "whole"))
    assert len(made.history) == len(before.history) + 1


def same(one: Artifact, other: Artifact) -> bool:
    """Equal bases, and equal adapters where there are any."""
    pairs: list[dict[str, Any]] = [
        {} if artifact.lora is None else dict(artifact.lora.tensors) for artifact in (one, other)
    ]
    adapters = pairs[0].keys() == pairs[1].keys() and all(
        torch.equal(tensor, pairs[1][name]) for name, tensor in pairs[0].items()
    )
    return same_bases(one, other) and adapters


def test_other_settings_do_not_go_on(
    asked: list[Word], run: Path, matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        press_at(3, patch)
        assert matkv(*asked).code == 130
    kept = (run / "bases.safetensors").read_bytes()
    message = matkv(*asked, "--lr", 0.5, "--resume").refusal()
    assert "lr 0.01 (now 0.5)" in message and "without resume" in message
    assert (run / "bases.safetensors").read_bytes() == kept


def test_a_new_run_forgets_what_an_older_one_started_from(
    asked: list[Word], run: Path, home: Path, matkv: Program
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        press_at(3, patch)
        assert matkv(*asked).code == 130
        assert (checkpoints_of(run) / "start").is_dir()
        asked[1] = home / "run"
        assert matkv(*asked, "-o", run).code == 130
    assert any(checkpoints_of(run).iterdir())
    assert not (checkpoints_of(run) / "start").exists()


def test_a_checkpoint_of_other_bases_does_not_go_on(
    asked: list[Word], run: Path, tmp_path: Path, matkv: Program
) -> None:
    asked = [*asked, "-o", tmp_path / "out"]
    with pytest.MonkeyPatch.context() as patch:
        press_at(3, patch)
        assert matkv(*asked).code == 130
    Artifact.load(tmp_path / "out").save(run)
    message = matkv(*asked, "--resume").refusal()
    assert "started from other bases" in message and "without resume" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "all"], "objective 'all' must be one of local, end-to-end, both"),
        (["--schedule", "x"], "schedule 'x' must be one of"),
        (["--steps", "0"], "steps 0 must be above 0"),
        (["--lr", "nan"], "lr nan must be a finite number"),
        (["--data", "{tmp}/none.jsonl"], "none.jsonl"),
        (["--config", "{tmp}/none.toml"], "no recipe"),
        (["-o", "{tmp}"], "is not an artifact"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    asked: list[Word],
    run: Path,
    tmp_path: Path,
    matkv: Program,
    options: list[str],
    message: str,
) -> None:
    before = (run / "bases.safetensors").read_bytes()
    given = [option.format(tmp=tmp_path) for option in options]
    assert message in matkv(*asked, *given).refusal()
    assert (run / "bases.safetensors").read_bytes() == before


def test_progress_and_losses_are_numbers(
    asked: list[Word], matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []

    @contextmanager
    def line(label: str) -> Iterator[Callable[[Progress], None]]:
        yield seen.append

    monkeypatch.setattr("matkv.commands.distill.progress_bar", line)
    assert matkv(*asked).code == 0
    assert [at.done for at in seen] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(loss) and loss > 0 for loss in (at.figures["loss"] for at in seen))
    assert seen[-1].figures["tokens"] == 6 * 2 * 32


def test_a_run_one_stands_in(
    asked: list[Word], run: Path, matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked[1] = "."
    monkeypatch.chdir(run)
    press_at(4, monkeypatch)
    assert matkv(*asked).code == 130
    monkeypatch.undo()
    monkeypatch.chdir(run)
    ended = matkv(*asked, "--resume")
    assert ended.code == 0, ended.err
    assert Artifact.load(run).history[-1]["stage"] == "distill"
    assert not list(run.parent.glob(".run.*"))
