"""Attention where shapes say nothing of how many tokens there are: masks say it all.

Shapes: B batch, H query head, G KV head, Q query, T slot, R row, S sink token, C column at full
width, D head dim, F = 2 D, [key | value].
"""

from __future__ import annotations

import torch
from torch import Tensor

from matkv.attention.exact import attend_columns
from matkv.attention.masks import additive
from matkv.latents.latents import Fixed


def fixed_masks(
    fixed: Fixed, mask: Tensor | None, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Which columns at full width, and which of `rows` latents, each query reads: numbers to add.

    [B|1 1 Q C], [B|1 1 Q R]; `mask` [B|1, 1, Q, T] is that of all slots, None if it is causal.
    """
    sink_BS, place_C, query_Q1 = fixed.sink_BS, fixed.place_C, fixed.query_Q[:, None]
    place_R = torch.arange(fixed.sink, fixed.sink + rows, device=place_C.device)
    far_BQR = _after(sink_BS, place_R)
    near_BQC = _after(sink_BS, place_C) & (query_Q1 - place_C < fixed.reach)
    if mask is None:
        far_BQR = far_BQR & (place_R <= query_Q1)
        near_BQC = near_BQC & (place_C <= query_Q1)
        sinks_BQS = sink_BS[:, None] <= query_Q1
    else:
        sinks_BQS = sink_BS[:, None] <= query_Q1[-1:]
    if mask is None or fixed.reach:
        far_BQR = far_BQR & (query_Q1 - place_R >= fixed.reach)
    reads = [sinks_BQS.expand(-1, len(query_Q1), -1), near_BQC]
    batch = max(len(part) for part in reads)
    reads_BQC = torch.cat([part.expand(batch, -1, -1) for part in reads], dim=2)[:, None]
    if mask is None:
        return additive(reads_BQC, dtype), additive(far_BQR[:, None], dtype)
    slot_BC = torch.cat((sink_BS, place_C.expand(len(sink_BS), -1)), dim=1)
    near = additive(_picked(mask, slot_BC), dtype, reads_BQC)
    given = mask[..., fixed.sink : fixed.sink + rows]
    return near, additive(given, dtype, far_BQR[:, None])


def attend_fixed(
    fixed: Fixed, query_BHQD: Tensor, bias: Tensor, *, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention over the columns, and the log of the weights' sum.  [BHQD -> BHQD, BHQ]"""
    heads, dtype = fixed.columns_BGCF.shape[1], fixed.columns_BGCF.dtype
    query_BGJQD = query_BHQD.to(dtype).unflatten(1, (heads, -1))
    out_BGJQD, lse_BGJQ = attend_columns(
        query_BGJQD, fixed.columns_BGCF, bias.to(dtype), scaling, dropout
    )
    return out_BGJQD.flatten(1, 2).to(query_BHQD.dtype), lse_BGJQ.flatten(1, 2)


def _after(sink_BS: Tensor, place_C: Tensor) -> Tensor:
    """Whether slots hold tokens after a sequence's sinks.  [B|1 1 C]"""
    if sink_BS.shape[1] == 0:
        return (place_C >= 0)[None, None]
    return (place_C > sink_BS[:, -1:])[:, None]


def _picked(mask: Tensor, slot_BC: Tensor) -> Tensor:
    """A mask's columns at some slots.  [B|1 1 Q C]"""
    slot_BC = slot_BC.clamp(0, mask.shape[3] - 1)
    if len(slot_BC) == 1:
        return mask.index_select(3, slot_BC[0])
    mask = mask.expand(len(slot_BC), -1, -1, -1)
    return mask.gather(3, slot_BC[:, None, None].expand(-1, 1, mask.shape[2], -1))
