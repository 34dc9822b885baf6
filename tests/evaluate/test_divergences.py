"""Divergence from the full cache: what it is, that it is kept, and how it is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import matkv
from matkv.artifact.results import Results, load_rows
from matkv.artifact.setting import Setting
from matkv.commands.tables import divergence_table
from matkv.errors import DataError
from matkv.evaluate import divergences as module
from matkv.evaluate.divergences import DIVERGENCE, divergences
from matkv.hf.attach import attachment_of
from tiny import Tiny, tokens


def rows_of(subject: Tiny, run: Path | None = None, **options: Any) -> list[dict[str, Any]]:
    windows_NT = options.pop("windows", tokens(5, 24, seed=4))
    budgets = options.pop("budgets", (None, 1.0, 0.5))
    settings = [Setting(budget=one) for one in budgets]
    kept = Results(run, DIVERGENCE)
    return divergences(
        subject.model, subject.artifact, windows_NT, "text", settings, kept, **options
    )


def test_it_is_the_divergence_of_the_two_models(llama: Tiny) -> None:
    windows_NT = tokens(5, 24, seed=4)
    full, half = rows_of(llama)
    with torch.no_grad():
        p_NTV = llama.model(windows_NT).logits[:, :-1].double().softmax(-1)
        matkv.attach(llama.model, llama.artifact, 0.5)
        q_NTV = llama.model(windows_NT).logits[:, :-1].double().softmax(-1)
        matkv.detach(llama.model)
    kl_NT = F.kl_div(q_NTV.log(), p_NTV, reduction="none").sum(-1)
    same_NT = (p_NTV.argmax(-1) == q_NTV.argmax(-1)).double()
    assert half["kl"] == pytest.approx(float(kl_NT.mean()), rel=1e-3)
    assert half["same"] == pytest.approx(float(same_NT.mean()))
    assert half["kl_stderr"] == pytest.approx(float(kl_NT.mean(1).std()) / math.sqrt(5), rel=1e-3)
    assert half["tokens"] == 5 * 23
    assert full["kl"] == pytest.approx(0, abs=1e-5)
    assert full["same"] == 1
    assert attachment_of(llama.model) is None


def test_the_full_cache_is_no_row(llama: Tiny) -> None:
    assert rows_of(llama, budgets=(None,)) == []
    assert [row["budget"] for row in rows_of(llama)] == [1.0, 0.5]


def test_rows_are_kept_and_not_measured_again(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    llama.artifact.save(run)
    seen: list[int] = []
    first = rows_of(llama, run, on_progress=lambda at: seen.append(at.done))
    assert seen[-1] == 2 * 5 * 24
    assert seen == sorted(seen)
    monkeypatch.setattr(module, "_measured", lambda *_: pytest.fail("measured again"))
    assert rows_of(llama, run) == first
    assert [row["kl"] for row in load_rows(run, "divergence")] == [row["kl"] for row in first]


def test_a_table_tells_errors_where_they_are_known(llama: Tiny) -> None:
    table = divergence_table("some", rows_of(llama))
    assert " ± " in str(list(table.columns[1].cells)[1])
    alone = divergence_table("one", rows_of(llama, windows=tokens(1, 24)))
    assert " ± " not in str(list(alone.columns[1].cells)[1])


def test_too_little_text_is_refused(llama: Tiny) -> None:
    with pytest.raises(DataError, match="at least 2"):
        rows_of(llama, windows=tokens(3, 1))
