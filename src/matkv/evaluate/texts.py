"""Evaluate: perplexity and bytes of the full cache and of every budget, side by side.

`evaluate` measures; `perplexity_rows` also keeps what was measured in a run's results, and does not
measure it again.

Shapes: N windows, B batch, T token, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact, digest
from matkv.artifact.records import Record
from matkv.artifact.results import Store
from matkv.errors import DataError
from matkv.hf.attach import attach, detach
from matkv.hf.geometry import geometry_of
from matkv.logits import token_losses
from matkv.ranks import RankTable, digest_of

KIND = "perplexity"
# What a kept row depends on: equal values of all, and it need not be measured again.
KEYS = (
    "artifact",
    "ranks",
    "budget",
    "uniform",
    "text",
    "data",
    "window_tokens",
    "tokens",
    "sink",
    "recent",
    "dtype",
)


@dataclass(frozen=True)
class Row:
    """One line of an evaluation; `budget` is None for the full cache.

    `kept` is the fraction of bytes that the ranks really keep, never above `budget`; `held` the
    fraction of the full cache that is held after a whole window of text, tokens kept exact counted.
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
    on_progress: Callable[[int], None] | None = None,
) -> tuple[float, float, int]:
    """exp of the mean negative log-likelihood of the tokens of every window but its first.

    Runs without a cache: on an attached model that is the truncated forward pass, which equals
    cached decoding. Returns the perplexity, the standard error of the mean log-likelihood over
    windows, and the number of predicted tokens. `on_progress` gets the number of tokens seen.

    Raises:
        DataError: a window of text is shorter than two tokens.
    """
    windows, length = windows_NT.shape
    if windows == 0 or length < 2:
        raise DataError(f"{windows} windows of {length} tokens: perplexity needs one of at least 2")
    means = []
    for index, window_T in enumerate(windows_NT):
        logits_TV = model(window_T[None].to(model.device), use_cache=False).logits[0, :-1]
        losses_T = token_losses(logits_TV, window_T[1:].to(model.device))
        means.append(float(losses_T.cpu().double().mean()))
        if on_progress is not None:
            on_progress((index + 1) * length)
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
    on_progress: Callable[[float | None, int], None] | None = None,
) -> list[Row]:
    """Perplexity and bytes per token of the full cache, then of each budget.

    `uniform` ignores stored rank tables. The model is left detached. `on_progress` gets the budget
    under way, None for the full cache, and the tokens seen of it.

    Raises:
        FingerprintError, BudgetError, DataError: see `attach` and `perplexity`.
    """
    tables = {budget: artifact.table(budget, uniform=uniform) for budget in budgets}
    exact = artifact.sink if sink is None else sink
    exact += artifact.recent if recent is None else recent
    detach(model)
    rows = []
    try:
        for budget in [None, *budgets] if full_cache else list(budgets):
            table = RankTable.full(geometry_of(model.config))
            if budget is not None:
                table = tables[budget]
                attach(model, artifact, ranks=table, sink=sink, recent=recent)
            rows.append(_row(model, windows_NT, budget, table, exact, on_progress))
    finally:
        detach(model)
    return rows


def _row(
    model: PreTrainedModel,
    windows_NT: Tensor,
    budget: float | None,
    table: RankTable,
    exact: int,
    on_progress: Callable[[float | None, int], None] | None,
) -> Row:
    def report(tokens: int) -> None:
        if on_progress is not None:
            on_progress(budget, tokens)

    started = time.perf_counter()
    value, stderr, tokens = perplexity(model, windows_NT, on_progress=report)
    at_full_width = min(1.0, exact / windows_NT.shape[1])
    return Row(
        budget=budget,
        kept=table.budget,
        held=at_full_width + (1 - at_full_width) * table.budget,
        perplexity=value,
        stderr=stderr,
        bytes_per_token=table.bytes_per_token(model.dtype),
        tokens=tokens,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What `perplexity_rows` measures; `text` is the name that its rows bear.

    `uniform`, `sink` and `recent` as for `evaluate`; `again` measures what is already known.
    """

    text: str
    uniform: bool = False
    sink: int | None = None
    recent: int | None = None
    again: bool = False


def perplexity_rows(
    model: PreTrainedModel,
    artifact: Artifact,
    windows_NT: Tensor,
    budgets: Sequence[float | None],
    config: TextConfig,
    *,
    run: Path,
    on_progress: Callable[[float | None, int], None] | None = None,
) -> list[Record]:
    """A record of perplexity for every budget, None being the full cache, kept in `run`.

    Raises:
        FingerprintError, BudgetError, DataError, ArtifactError: see `evaluate` and `save_rows`.
    """
    store = Store(run, KIND, KEYS, again=config.again)
    shared = {
        "artifact": digest(artifact),
        "text": config.text,
        "data": hashlib.sha256(windows_NT.cpu().numpy().tobytes()).hexdigest()[:12],
        "window_tokens": windows_NT.shape[1],
        "tokens": windows_NT.shape[0] * (windows_NT.shape[1] - 1),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    records = []
    for budget in budgets:
        about = shared | _about(artifact, budget, config)
        record = store.find(about)
        if record is None:
            row = evaluate(
                model,
                artifact,
                windows_NT,
                [] if budget is None else [budget],
                uniform=config.uniform,
                sink=config.sink,
                recent=config.recent,
                full_cache=budget is None,
                on_progress=on_progress,
            )[0]
            (record,) = store.add([about | row.to_json()])
        records.append(record)
    return records


def _about(artifact: Artifact, budget: float | None, config: TextConfig) -> Record:
    """What depends on the budget of a record, before it is measured."""
    if budget is None:
        return {"budget": None, "ranks": None, "uniform": False, "sink": None, "recent": None}
    return {
        "budget": budget,
        "ranks": digest_of(artifact.table(budget, uniform=config.uniform)),
        "uniform": config.uniform,
        "sink": artifact.sink if config.sink is None else config.sink,
        "recent": artifact.recent if config.recent is None else config.recent,
    }
