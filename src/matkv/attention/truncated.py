"""Attention at full width in which recent tokens are exact: what training and search see.

A token is exact for its own query, those up to `recent` positions after it and those before it that
a mask lets see it, and truncated for later ones, as a cache with recent tokens holds it. Gradients
flow through both.

Shapes: B batch, H query head, G KV head, J query heads of a KV head, Q query position, T token,
K tokens that a block of queries sees, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from matkv.attention.masks import additive, causal_bias, look_ahead

# Queries that attend together: few, so that little is computed only to be masked; not so few that
# the calls cost more than what they save.
BLOCK = 256


@dataclass(frozen=True)
class States:
    """Keys and values [BGTD] of one layer."""

    key_BGTD: Tensor
    value_BGTD: Tensor


def attend_near_exact(
    query_BHQD: Tensor,
    exact: States,
    truncated: States,
    mask: Tensor | None,
    *,
    recent: int,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention output [BHQD] of queries to which recent tokens are exact.

    `mask` [B|1, 1, Q, T] is boolean or additive, None means causal; the last query is at the last
    token. Every block of queries sees one row of keys: those far from some of it truncated, those
    near some of it exact. A token that is both stands there twice, and a mask picks one.
    """
    Q, (heads, T) = query_BHQD.shape[2], exact.key_BGTD.shape[1:3]
    dtype, device = query_BHQD.dtype, query_BHQD.device
    bias_BGQT = causal_bias(Q, T, query_BHQD)[None, None] if mask is None else additive(mask, dtype)
    token_T = torch.arange(T, device=device)
    ahead = look_ahead(mask, T - Q)
    query_BGJQD = query_BHQD.unflatten(1, (heads, -1))
    outs = []
    for first in range(0, Q, BLOCK):
        block_BGJQD = query_BGJQD[:, :, :, first : first + BLOCK]
        J, block = block_BGJQD.shape[2:4]
        position_Q = token_T[T - Q + first :][:block]
        end = T - Q + first + block
        far, near = (
            slice(max(0, end - 1 - recent)),
            slice(max(0, end - block - recent), end + ahead),
        )
        key_BGKD = torch.cat((truncated.key_BGTD[:, :, far], exact.key_BGTD[:, :, near]), 2)
        value_BGKD = torch.cat((truncated.value_BGTD[:, :, far], exact.value_BGTD[:, :, near]), 2)
        is_near_QT = position_Q[:, None] - token_T <= recent
        picked_QK = torch.cat((~is_near_QT[:, far], is_near_QT[:, near]), dim=1)
        rows_BGQT = bias_BGQT[:, :, first : first + block]
        bias_BGQK = torch.cat((rows_BGQT[..., far], rows_BGQT[..., near]), dim=-1)
        bias_BGQK = bias_BGQK.masked_fill(~picked_QK, torch.finfo(dtype).min)
        out_BGXD = F.scaled_dot_product_attention(
            block_BGJQD.flatten(2, 3),
            key_BGKD,
            value_BGKD,
            attn_mask=bias_BGQK.repeat(1, 1, J, 1),
            dropout_p=dropout,
            scale=scaling,
        )
        outs.append(out_BGXD.unflatten(2, (J, block)))
    return torch.cat(outs, dim=3).flatten(1, 2)
