"""How far the predictions of a budget are from the full cache's, token by token of a text.

    KL = mean over tokens of KL(full ‖ budget), in nats;   same: both have the same likeliest token

Perplexity says how well a text is predicted, this how much of the model is left: a cache may lose
much of it and yet predict some text no worse.

Shapes: N windows, T token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.artifact.results import Kind, Results
from matkv.artifact.setting import CACHE_KEYS, Setting, budget_name
from matkv.errors import DataError
from matkv.evaluate.texts import facts_of
from matkv.hf.attach import attached, identified
from matkv.hf.geometry import check_positions
from matkv.logits import row_blocks
from matkv.progress import OnProgress, Report

DIVERGENCE = Kind("divergence", (*CACHE_KEYS, "text", "data", "window_tokens", "tokens"))
GROUP = 4  # windows whose predictions of the full cache are held at once


def divergences(
    model: PreTrainedModel,
    artifact: Artifact,
    windows_NT: Tensor,
    text: str,
    settings: Sequence[Setting],
    results: Results,
    *,
    on_progress: OnProgress | None = None,
) -> list[Record]:
    """A record of divergence for every setting but the full cache, from which it is measured.

    `kl` in nats a token and `same`, the share of tokens with the same likeliest next one, with
    their standard errors over windows. Both sides run without a cache: on an attached model that is
    the truncated forward pass, which equals cached decoding. Rows that `results` has are not
    measured again.

    Raises:
        DataError: there is no window of at least two tokens, or it exceeds the model's positions.
        BudgetError, FingerprintError, RankError: see `attach`.
    """
    count, length = windows_NT.shape
    if count == 0 or length < 2:
        raise DataError(f"{count} windows of {length} tokens: a divergence needs one of at least 2")
    check_positions(model, length, 0)
    fixed = facts_of(windows_NT, text)
    budgets = [one for one in settings if one.budget is not None]
    report = Report(on_progress, "evaluating", windows_NT.numel() * len(budgets))
    rows: list[Record] = []
    for setting, cache in identified(model, artifact, budgets):
        name = budget_name(setting.budget)
        part = report.part(len(rows) * windows_NT.numel(), name)
        row = results.find(cache | fixed)
        if row is None:
            found_2N = _measured(model, artifact, windows_NT, setting, part)
            (row,) = results.add([cache | fixed | _summary(found_2N)])
        rows.append(row)
        report(len(rows) * windows_NT.numel(), name)
    return rows


@torch.inference_mode()
def _measured(
    model: PreTrainedModel,
    artifact: Artifact,
    windows_NT: Tensor,
    setting: Setting,
    on_progress: OnProgress,
) -> Tensor:
    """Divergence, and the share of equal next tokens, of every window.  [2N]"""
    report, found = Report(on_progress, "evaluating", windows_NT.numel()), list[Tensor]()
    for group_NT in windows_NT.to(model.device).split(GROUP):
        full = []
        with attached(model, artifact, Setting()):
            full += [_logits(model, window_T) for window_T in group_NT]
        with attached(model, artifact, setting):
            for window_T, full_TV in zip(group_NT, full, strict=True):
                found.append(_apart(full_TV, _logits(model, window_T)))
                report(len(found) * len(window_T))
    return torch.stack(found, dim=1)


def _logits(model: PreTrainedModel, window_T: Tensor) -> Tensor:
    """What is predicted after each token of a window but its last.  [TV]"""
    logits_TV: Tensor = model(window_T[None], use_cache=False).logits[0, :-1]
    return logits_TV


def _apart(full_TV: Tensor, own_TV: Tensor) -> Tensor:
    """Mean divergence, and how often the likeliest token is the same.  [2]"""
    kl, same = torch.zeros(2, dtype=torch.float64, device=full_TV.device)
    for rows in row_blocks(full_TV):
        log_p_RV, log_q_RV = (x_TV[rows].float().log_softmax(-1) for x_TV in (full_TV, own_TV))
        kl += F.kl_div(log_q_RV, log_p_RV, reduction="sum", log_target=True).double()
        same += (log_p_RV.argmax(-1) == log_q_RV.argmax(-1)).sum()
    return torch.stack((kl, same)).cpu() / len(full_TV)


def _summary(found_2N: Tensor) -> Record:
    windows = found_2N.shape[1]
    kl, same = found_2N.mean(1).tolist()
    spread_2 = found_2N.std(1) / math.sqrt(windows) if windows > 1 else [math.nan, math.nan]
    kl_stderr, same_stderr = (float(one) for one in spread_2)
    return {"kl": kl, "kl_stderr": kl_stderr, "same": same, "same_stderr": same_stderr}
