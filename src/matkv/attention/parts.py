"""Attention in parts: over disjoint sets of tokens, put together by log-sum-exp.

    out = Σ_part exp(lse_part - lse) out_part        lse = log Σ_part exp(lse_part)

Shapes: B batch, N head, Q query, T token, D width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matkv.attention.masks import causal_bias

# Explicit scores of one block of queries stay under this many elements (128 MiB in fp32).
MAX_SCORES = 1 << 25
# Like F.scaled_dot_product_attention at equal widths, but also returns the log of the sum of
# exponentials of each query's scores. Autograd knows the output's gradients, not the sum's.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_part(
    query_BNQD: Tensor,
    key_BNTD: Tensor,
    value_BNTD: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output [BNQD] over these tokens alone, and the log of the weights' sum [BNQ] in fp32.

    `mask` is additive and finite, broadcastable to [BNQT]; `is_causal` needs as many queries as
    tokens and no mask. Scores are formed explicitly, in blocks of queries, off the CPU, where
    gradients flow and with dropout.
    """
    if query_BNQD.device.type == "cpu" and not dropout and not flows(query_BNQD, key_BNTD):
        out_BNQD, lse_BNQ = flash(
            query_BNQD, key_BNTD, value_BNTD, is_causal=is_causal, attn_mask=mask, scale=scaling
        )
        return out_BNQD, lse_BNQ
    Q, T = query_BNQD.shape[2], key_BNTD.shape[2]
    if is_causal:
        mask = causal_bias(Q, T, query_BNQD)
    block = max(1, MAX_SCORES // (query_BNQD.shape[0] * query_BNQD.shape[1] * T))
    blocks = [
        _explicit(query, key_BNTD, value_BNTD, bias, scaling, dropout)
        for query, bias in zip(query_BNQD.split(block, dim=2), _rows(mask, Q, block), strict=True)
    ]
    outs, sums = zip(*blocks, strict=True)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def merge(
    one_BHQD: Tensor, lse_one_BHQ: Tensor, other_BHQD: Tensor, lse_other_BHQ: Tensor
) -> Tensor:
    """Two parts put together, in the dtype of the other.  [BHQD]"""
    dtype = other_BHQD.dtype
    share_BHQ1 = torch.sigmoid(lse_one_BHQ - lse_other_BHQ)[..., None].to(dtype)
    return torch.lerp(other_BHQD, one_BHQD.to(dtype), share_BHQ1)


def even_lse(mask: Tensor | None, queries: int, tokens: int, like: Tensor) -> Tensor:
    """The log of the weights' sum where all scores are zero, causal without a mask.  [B|1 1 Q]"""
    if mask is not None:
        return mask.float().logsumexp(-1)
    seen_Q = torch.arange(tokens - queries + 1, tokens + 1, device=like.device)
    return seen_Q.float().log()[None, None]


def flows(*tensors: Tensor) -> bool:
    """Whether gradients flow through any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _rows(mask: Tensor | None, queries: int, block: int) -> list[Tensor | None]:
    """The mask of every block of queries."""
    starts = range(0, queries, block)
    if mask is None or mask.shape[-2] == 1:
        return [mask for _ in starts]
    return [mask[..., first : first + block, :] for first in starts]


def _explicit(
    query_BNQD: Tensor,
    key_BNTD: Tensor,
    value_BNTD: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    scores_BNQT = (query_BNQD @ key_BNTD.mT).float() * scaling
    if mask is not None:
        scores_BNQT = scores_BNQT + mask
    weights_BNQT = F.dropout(scores_BNQT.softmax(-1), dropout).to(value_BNTD.dtype)
    return weights_BNQT @ value_BNTD, scores_BNQT.logsumexp(-1)
