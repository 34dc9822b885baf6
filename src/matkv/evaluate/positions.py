"""The loss of a text by the position of the token in its window.

Shapes: N windows, T token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import CACHE_KEYS, Setting, budget_name
from matkv.errors import DataError
from matkv.files import digest
from matkv.hf.attach import attached, identified
from matkv.hf.geometry import check_positions
from matkv.logits import token_losses
from matkv.progress import OnProgress, Report

POSITIONS = Kind("positions", (*CACHE_KEYS, "text", "data", "window_tokens", "start", "end"))
FIRST_BUCKET = 64


def buckets(length: int) -> list[tuple[int, int]]:
    """[0, 64), [64, 128), [128, 256) … up to `length`, the last one cut there."""
    edges, end = [0], FIRST_BUCKET
    while edges[-1] < length:
        edges.append(min(end, length))
        end *= 2
    return list(pairwise(edges))


def positions(
    model: PreTrainedModel,
    artifact: Artifact,
    windows_NT: Tensor,
    text: str,
    settings: Sequence[Setting],
    results: Results,
    *,
    on_progress: OnProgress | None = None,
) -> list[Record]:
    """Perplexity of every setting by the position of the predicted token in its window.

    exp of the mean loss of the tokens at `start` <= position < `end`; a window's first token is not
    predicted. `stderr` is that of the mean loss, over windows. As `evaluate.perplexity`, it runs
    the truncated forward pass, which equals cached decoding.

    Raises:
        DataError: there is no window of at least two tokens, or it exceeds the model's positions.
        BudgetError, FingerprintError, RankError: see `attach`.
    """
    count, length = windows_NT.shape
    if count == 0 or length < 2:
        raise DataError(f"{count} windows of {length} tokens: perplexity needs one of at least 2")
    check_positions(model, length, 0)
    content = digest(windows_NT.cpu().numpy().tobytes())
    fixed = {"text": text, "data": content, "window_tokens": length}
    ranges = buckets(length)
    report = Report(on_progress, "evaluating", windows_NT.numel() * len(settings))
    rows: list[Record] = []
    done = 0
    for setting, cache in identified(model, artifact, settings):
        note = budget_name(setting.budget)
        names = [{**cache, **fixed, "start": start, "end": end} for start, end in ranges]
        found = [row for name in names if (row := results.find(name)) is not None]
        if len(found) < len(names):
            with attached(model, artifact, setting):
                losses_NT = _losses(model, windows_NT, report.part(done, note))
            found = results.add([{**name, **_bucket(losses_NT, name)} for name in names])
        rows += found
        done += windows_NT.numel()
        report(done, note)
    return rows


@torch.inference_mode()
def _losses(model: PreTrainedModel, windows_NT: Tensor, on_progress: OnProgress) -> Tensor:
    """Loss of every token by its position; NaN for the first ones.  [NT]"""
    report = Report(on_progress, "evaluating", windows_NT.numel())
    losses_NT = torch.full(windows_NT.shape, math.nan, dtype=torch.float64)
    for index, window_T in enumerate(windows_NT.to(model.device)):
        logits_TV = model(window_T[None], use_cache=False).logits[0, :-1]
        losses_NT[index, 1:] = token_losses(logits_TV, window_T[1:]).cpu()
        report((index + 1) * windows_NT.shape[1])
    return losses_NT


def _bucket(losses_NT: Tensor, name: Record) -> Record:
    part_NT = losses_NT[:, max(name["start"], 1) : name["end"]]
    means_N = part_NT.mean(1)
    spread = float(means_N.std()) if len(means_N) > 1 else math.nan
    return {
        "perplexity": math.exp(float(means_N.mean())),
        "stderr": spread / math.sqrt(len(means_N)),
        "tokens": part_NT.numel(),
    }
