"""Which token a query reads, and in which part: masks, as finite numbers to add to scores.

A mask that is given says alone what a query sees, later tokens too; without one that is every token
up to its own. Of these, a query reads sinks and those fewer than `reach` tokens before it at full
width, later ones as well, and the others as latents.

Shapes: B batch, Q query, T token, S sink token, C sinks and a stretch of other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matkv.latents.latents import Exact

# What is added to the score of a hidden token is lower than this, however it was made.
HIDDEN = -5e3


def causal_bias(queries: int, tokens: int, like: Tensor) -> Tensor:
    """Additive [Q T] in the dtype of `like`: the last query sees every token."""
    sees_QT = torch.ones(queries, tokens, dtype=torch.bool, device=like.device)
    return additive(sees_QT.tril(tokens - queries), like.dtype)


def additive(mask: Tensor, dtype: torch.dtype, also: Tensor | None = None) -> Tensor:
    """A mask as finite numbers to add to scores; a boolean one is True where a query sees.

    The lowest finite number stands for minus infinity: a fully masked row stays finite. `also` is
    a boolean mask on top.
    """
    lowest = torch.finfo(dtype).min
    if mask.dtype != torch.bool:
        mask = mask if also is None else mask.masked_fill(~also, -torch.inf)
        return mask.to(dtype).clamp_min(lowest)
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask if also is None else mask & also, zero, lowest)


def visible(mask: Tensor) -> Tensor:
    """A boolean mask from any."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def seen_slots(mask: Any) -> Tensor | None:
    """Which slots hold tokens, as far as a mask that a decoder takes tells.  [B|1 T]

    That is [B T], what attention adds or is told [B|1 1 Q T], or such a one for every kind of
    layer, by name. None if there is no mask.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    return visible(mask).any(2)[:, 0] if mask.dim() == 4 else mask.bool()


def look_ahead(mask: Tensor | None, first: int) -> int:
    """How far after its own a query sees a token, the first query being at the slot `first`.

    Waits for the device where there is a mask for several queries.
    """
    if mask is None or mask.shape[2] == 1:
        return 0
    sees_QT = visible(mask).flatten(0, 1).any(0)
    Q, T = sees_QT.shape
    last_Q = T - 1 - sees_QT.flip(-1).to(torch.uint8).argmax(-1)
    ahead_Q = last_Q - torch.arange(first, first + Q, device=mask.device)
    return max(0, int((ahead_Q * sees_QT.any(-1)).max()))


def near_mask(
    exact: Exact, mask: Tensor | None, query_Q: Tensor, stretch: slice, dtype: torch.dtype
) -> Tensor:
    """Which sinks, and which tokens in the slots of `stretch`, queries in their slots read exactly.

    [B|1 1 Q C]; `mask` [B|1, 1, Q, T] is that of all tokens.
    """
    place_T = torch.arange(stretch.start, stretch.stop, device=query_Q.device)
    sink_BS = exact.sink_BS
    if sink_BS is None:
        sink_BS = torch.arange(exact.sink, device=query_Q.device)[None]
    near_BQT = _after_sinks(exact, place_T)[:, None] & (
        _distance(exact, query_Q, place_T) < exact.reach
    )
    if mask is None:
        sinks_BQS = (sink_BS[:, None] <= query_Q[:, None]) & (sink_BS >= 0)[:, None]
        near_BQT = near_BQT & (place_T <= query_Q[:, None])
    else:
        is_there_BS = (sink_BS >= 0) & (sink_BS < exact.tokens)
        sinks_BQS = is_there_BS[:, None].expand(-1, len(query_Q), -1)
    batch = max(len(sinks_BQS), len(near_BQT), 1 if mask is None else len(mask))
    reads_BQC = torch.cat([x.expand(batch, -1, -1) for x in (sinks_BQS, near_BQT)], dim=-1)
    if mask is None:
        return additive(reads_BQC[:, None], dtype)
    slots_BQS = sink_BS.clamp(0, exact.tokens - 1)[:, None].expand(batch, len(query_Q), -1)
    mask = mask.expand(batch, -1, -1, -1)
    mask = torch.cat((mask.gather(3, slots_BQS[:, None]), mask[..., stretch]), dim=3)
    return additive(mask, dtype, reads_BQC[:, None])


def far_mask(
    exact: Exact, mask: Tensor | None, queries: int, rows: int, dtype: torch.dtype
) -> Tensor:
    """Which of `rows` latents, from the slot `begin` on, the last `queries` read.

    [B|1 1 Q rows]
    """
    device = exact.recent_BGKF.device
    query_Q = torch.arange(exact.tokens - queries, exact.tokens, device=device)
    place_T = torch.arange(exact.begin, exact.begin + rows, device=device)
    far_BQT = _after_sinks(exact, place_T)[:, None].expand(-1, queries, -1)
    if mask is None or exact.reach:
        far_BQT = far_BQT & (_distance(exact, query_Q, place_T) >= exact.reach)
    if mask is None:
        return additive(far_BQT[:, None], dtype)
    given = mask[:, :, -queries:, exact.begin : exact.begin + rows]
    return additive(given, dtype, far_BQT[:, None])


def _distance(exact: Exact, query_Q: Tensor, place_T: Tensor) -> Tensor:
    """How many tokens a slot lies before a query's.  [B|1 Q T]"""
    if exact.count_BT is None:
        return (query_Q[:, None] - place_T)[None]
    return exact.count_BT[:, query_Q, None] - exact.count_BT[:, None, place_T]


def _after_sinks(exact: Exact, place_T: Tensor) -> Tensor:
    """Whether slots come after a sequence's sinks, and so after the padding before it.  [B|1 T]"""
    if exact.sink_BS is None:
        return (place_T >= exact.sink)[None]
    return place_T > exact.sink_BS[:, -1:]
