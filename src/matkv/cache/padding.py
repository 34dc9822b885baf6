"""Which slots of a cache hold tokens: the padding of a batch.

Shapes: B batch, Q new token, T slot of the cache, S sink token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from matkv.attention.masks import visible


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a padded batch are among the slots of a cache.

    `count_BT` counts a sequence's tokens up to each slot. The last sequence starts at the slot
    `latest`. After its start a sequence has at most `holes` slots without a token, `inside` of them
    before its last one.
    """

    count_BT: Tensor
    latest: int
    holes: int
    inside: int

    @classmethod
    def of(cls, real_BT: Tensor) -> Padding:
        """Waits for the device."""
        T, count_BT = real_BT.shape[1], real_BT.cumsum(-1)
        empty_B, all_B = (count_BT == 0).sum(-1), count_BT[:, -1]
        after_B = real_BT.flip(-1).cumsum(-1).eq(0).sum(-1)
        holes_B = T - empty_B - all_B
        inside_B = (holes_B - after_B).clamp_min(0)
        most = [int(x) for x in torch.stack((empty_B, holes_B, inside_B)).amax(-1).tolist()]
        return cls(count_BT, *most)

    def sinks(self, sink: int) -> Tensor:
        """Slots of the first tokens of each sequence; those to come follow one another.  [BS]"""
        T, sink_S = self.count_BT.shape[1], torch.arange(sink, device=self.count_BT.device)
        sink_BS = sink_S.expand(len(self.count_BT), -1).contiguous()
        there_BS = torch.searchsorted(self.count_BT, sink_BS + 1)
        return torch.where(there_BS < T, there_BS, T + sink_BS - self.count_BT[:, -1:])


def holes_among(count_BT: Tensor, recent: int) -> int:
    """The most slots without a token among the last `recent` tokens of a sequence and after."""
    all_B1 = count_BT[:, -1:]
    is_recent_BT = (count_BT > 0) & (count_BT > all_B1 - recent)
    return int((is_recent_BT.sum(-1) - all_B1.clamp_max(recent)[:, 0]).max())


def new_tokens(mask: Any, batch: int, first: int, queries: int) -> Tensor | None:
    """Which of the slots from `first` on hold tokens, from any mask that a decoder takes.  [BQ]

    That is [B T], what attention adds or is told [B|1 1 Q T], or such a one for every kind of
    layer, by name. None if there is no mask.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    mask = mask[..., first : first + queries]
    if mask.dim() == 4:
        mask = visible(mask).any(2)[:, 0]
    return F.pad(mask.bool(), (0, queries - mask.shape[-1])).expand(batch, -1)
