"""Masks as finite numbers to add to scores.

Shapes: Q query, T token."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_bias(queries: int, tokens: int, like: Tensor) -> Tensor:
    """Additive [Q T] in the dtype of `like`: the last query sees every token."""
    sees_QT = torch.ones(queries, tokens, dtype=torch.bool, device=like.device)
    return additive(sees_QT.tril(tokens - queries), like.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as finite numbers to add to scores; a boolean one is True where a query sees.

    The lowest finite number stands for minus infinity: a fully masked row stays finite.
    """
    lowest = torch.finfo(dtype).min
    if mask.dtype != torch.bool:
        return mask.to(dtype).clamp_min(lowest)
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, lowest)
