"""Evaluate: perplexity and bytes of the full cache and of every budget, side by side.

`evaluate` measures; `perplexity_rows` also keeps what was measured in a run's results, and does not
measure it again.

Shapes: N windows, B batch, T token, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import CACHE_KEYS, Setting, budget_name
from matkv.errors import DataError
from matkv.files import digest
from matkv.hf.attach import attached, attached_table, identified
from matkv.logits import token_losses
from matkv.progress import OnProgress, Report

PERPLEXITY = Kind("perplexity", (*CACHE_KEYS, "text", "data", "window_tokens", "tokens"))


@dataclass(frozen=True)
class Row:
    """One line of an evaluation; `budget` is None for the full cache.

    `kept` is the fraction of bytes that the ranks really keep, never above `budget`; `held` the
    fraction of the full cache that is held after a whole window of text, tokens kept exact and
    layers with a sliding window counted.
    `bytes_per_token` is what each further token of one sequence adds, in the model's dtype;
    `tokens` the number of predicted tokens; `stderr` the standard error of the mean log-likelihood
    over windows.
    """

    budget: float | None
    kept: float
    held: float
    perplexity: float
    stderr: float
    bytes_per_token: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows_NT: Tensor,
    *,
    on_progress: OnProgress | None = None,
) -> tuple[float, float, int]:
    """exp of the mean negative log-likelihood of the tokens of every window but its first.

    Runs without a cache: on an attached model that is the truncated forward pass, which equals
    cached decoding. Returns the perplexity, the standard error of the mean log-likelihood over
    windows, and the number of predicted tokens.

    Raises:
        DataError: a window of text is shorter than two tokens.
    """
    windows, length = windows_NT.shape
    if windows == 0 or length < 2:
        raise DataError(f"{windows} windows of {length} tokens: perplexity needs one of at least 2")
    means = []
    report = Report(on_progress, "evaluating", windows_NT.numel())
    for index, window_T in enumerate(windows_NT):
        logits_TV = model(window_T[None].to(model.device), use_cache=False).logits[0, :-1]
        losses_T = token_losses(logits_TV, window_T[1:].to(model.device))
        means.append(float(losses_T.cpu().double().mean()))
        report((index + 1) * length)
    losses = torch.tensor(means, dtype=torch.float64)
    stderr = float(losses.std() / math.sqrt(windows)) if windows > 1 else math.nan
    return math.exp(float(losses.mean())), stderr, windows * (length - 1)


def evaluate(
    model: PreTrainedModel,
    artifact: Artifact,
    windows_NT: Tensor,
    budgets: Sequence[float],
    *,
    uniform: bool = False,
    sink: int | None = None,
    recent: int | None = None,
    full_cache: bool = True,
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """Perplexity and bytes per token of the full cache, then of each budget.

    `uniform` ignores stored rank tables. The model is left detached.

    Raises:
        FingerprintError, BudgetError, DataError: see `attach` and `perplexity`.
    """
    way = Setting(uniform=uniform, sink=sink, recent=recent)
    settings = [way.at(budget) for budget in ([None, *budgets] if full_cache else budgets)]
    report = Report(on_progress, "evaluating", windows_NT.numel() * len(settings))
    rows: list[Row] = []
    for setting, _ in identified(model, artifact, settings):
        part = report.part(len(rows) * windows_NT.numel(), budget_name(setting.budget))
        with attached(model, artifact, setting):
            rows.append(_row(model, artifact, windows_NT, setting, part))
    return rows


def _row(
    model: PreTrainedModel,
    artifact: Artifact,
    windows_NT: Tensor,
    setting: Setting,
    on_progress: OnProgress,
) -> Row:
    """The row of a model that is at `setting`."""
    table = artifact.table(1.0) if setting.budget is None else attached_table(model)
    started = time.perf_counter()
    value, stderr, tokens = perplexity(model, windows_NT, on_progress=on_progress)
    sink, recent = setting.exact(artifact)
    return Row(
        budget=setting.budget,
        kept=table.budget,
        held=table.held(windows_NT.shape[1], sink=sink, recent=recent),
        perplexity=value,
        stderr=stderr,
        bytes_per_token=table.bytes_per_token(model.dtype),
        tokens=tokens,
        seconds=time.perf_counter() - started,
    )


def facts_of(windows_NT: Tensor, text: str) -> Record:
    """What rows say of the windows they were measured on; `text` is the name that they bear."""
    count, length = windows_NT.shape
    return {
        "text": text,
        "data": digest(windows_NT.cpu().numpy().tobytes()),
        "window_tokens": length,
        "tokens": count * (length - 1),
    }


def perplexity_rows(
    model: PreTrainedModel,
    artifact: Artifact,
    windows_NT: Tensor,
    text: str,
    settings: Sequence[Setting],
    results: Results,
    *,
    on_progress: OnProgress | None = None,
) -> list[Record]:
    """A record of perplexity for every setting; `text` is the name that its rows bear.

    Rows that `results` has are not measured again, new ones are kept as soon as they are there.

    Raises:
        FingerprintError, BudgetError, DataError, ArtifactError: see `evaluate` and `Results`.
    """
    fixed = facts_of(windows_NT, text)
    report = Report(on_progress, "evaluating", windows_NT.numel() * len(settings))
    records: list[Record] = []
    for setting, cache in identified(model, artifact, settings):
        name = budget_name(setting.budget)
        part = report.part(len(records) * windows_NT.numel(), name)
        about = cache | fixed
        record = results.find(about)
        if record is None:
            with attached(model, artifact, setting):
                row = _row(model, artifact, windows_NT, setting, part)
            (record,) = results.add([about | row.to_json()])
        records.append(record)
        report(len(records) * windows_NT.numel(), name)
    return records
