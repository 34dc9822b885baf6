"""Attention at full width in which recent tokens are exact: what training and search see.

A token is exact for its own query and those up to `window` positions after it, and truncated for
later ones, as a cache with a window holds it. Gradients flow through both.

Shapes: B batch, H query head, G KV head, J query heads of a KV head, Q query position, T token,
D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class States:
    """Queries [BHQD], keys and values [BGTD] of one layer, in coordinates that go together."""

    query_BHQD: Tensor
    key_BGTD: Tensor
    value_BGTD: Tensor


def attend_near_exact(
    exact: States,
    truncated: States,
    mask: Tensor | None,
    *,
    window: int,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What recent tokens give, and what the others give, under one softmax.  [BHQD] each

    Both are outputs in the coordinates of their own values; their sum is the attention output once
    the second is turned back. `mask` [B|1, 1, Q, T] is boolean or additive, None means causal; the
    last query is at the last token. Scores are formed explicitly, for sequences of training length.
    """
    Q, T = exact.query_BHQD.shape[2], exact.key_BGTD.shape[2]
    device = exact.query_BHQD.device
    distance_QT = torch.arange(T - Q, T, device=device)[:, None] - torch.arange(T, device=device)
    near_QT = distance_QT <= window
    scores_BGJQT = torch.where(near_QT, _scores(exact), _scores(truncated)).float() * scaling
    if mask is None:
        mask = (distance_QT >= 0)[None, None]
    if mask.dtype == torch.bool:
        scores_BGJQT = scores_BGJQT.masked_fill(~mask[:, :, None], torch.finfo(torch.float32).min)
    else:
        scores_BGJQT = scores_BGJQT + mask.float()[:, :, None]
    weights_BGJQT = F.dropout(scores_BGJQT.softmax(-1), dropout).to(exact.value_BGTD.dtype)
    return (
        (weights_BGJQT.masked_fill(~near_QT, 0) @ exact.value_BGTD[:, :, None]).flatten(1, 2),
        (weights_BGJQT.masked_fill(near_QT, 0) @ truncated.value_BGTD[:, :, None]).flatten(1, 2),
    )


def _scores(states: States) -> Tensor:
    """Every head's scores, groups apart.  [-> BGJQT]"""
    heads = states.key_BGTD.shape[1]
    query_BGJQD = states.query_BHQD.unflatten(1, (heads, -1))
    scores_BGJQT: Tensor = query_BGJQD @ states.key_BGTD.mT[:, :, None]
    return scores_BGJQT
