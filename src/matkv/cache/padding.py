"""Which slots of a cache hold tokens: the padding of a batch.

Shapes: B batch, T slot of the cache, S sink token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from matkv.errors import CacheError


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a batch are, as all its layers share it.

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
        return cls(count_BT, *torch.stack((empty_B, holes_B, inside_B)).amax(-1).tolist())


class Slots:
    """Where a layer finds the tokens of each sequence, as far as its exact ones ask for it.

    Sinks are in the slots `sink_BS`, None where that is at the start. `gaps` is the most padding
    among the tokens that a query reads exactly, `spread` the same for queries to come, and from the
    slot `settled` on no token is a sink.
    """

    def __init__(self, sink: int, recent: int) -> None:
        self.sink, self.recent = sink, recent
        self.sink_BS: Tensor | None = None
        self.count_BT: Tensor | None = None
        self.holes = self.gaps = self.spread = 0
        self.settled = sink

    def note(self, padding: Padding, first: int) -> None:
        """Take in where the tokens are; those in the slots from `first` on are yet to come."""
        self.count_BT, self.holes = padding.count_BT, padding.holes
        self._place_sinks(first)
        self.settled = padding.latest + padding.holes + self.sink
        self.gaps = padding.holes if first else padding.inside
        self.spread = self.spread_at(padding.count_BT.shape[1])

    def cut(self, length: int) -> None:
        """Forget the slots from `length` on."""
        if self.count_BT is not None:
            self.spread = self.spread_at(length)
            self.count_BT = self.counted(length)
            self._place_sinks(length)

    def select(self, index_B: Tensor) -> None:
        if self.count_BT is not None:
            self.count_BT = self.count_BT.index_select(0, index_B)
        if self.sink_BS is not None:
            self.sink_BS = self.sink_BS.index_select(0, index_B)

    def move(self, device: torch.device | str) -> None:
        if self.count_BT is not None:
            self.count_BT = self.count_BT.to(device)
        if self.sink_BS is not None:
            self.sink_BS = self.sink_BS.to(device)

    def real(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Which of the first `length` slots hold tokens.  [BT]"""
        if self.count_BT is None:
            return torch.ones(batch, length, dtype=torch.bool, device=device)
        count_BT = self.counted(length).to(device)
        return count_BT > F.pad(count_BT, (1, -1))

    def counted(self, length: int) -> Tensor:
        """The count of tokens, with one more for every slot that nothing was noted of."""
        assert self.count_BT is not None
        count_BT = self.count_BT[:, :length]
        more_T = torch.arange(1, length - count_BT.shape[1] + 1, device=count_BT.device)
        self.count_BT = torch.cat((count_BT, count_BT[:, -1:] + more_T), dim=1)
        return self.count_BT

    def spread_at(self, length: int) -> int:
        """The most slots without a token among a sequence's last `recent` tokens, and after."""
        if self.count_BT is None or not self.holes or not self.recent:
            return 0
        count_BT = self.count_BT[:, :length]
        all_B1 = count_BT[:, -1:]
        is_recent_BT = (count_BT > 0) & (count_BT > all_B1 - self.recent)
        return int((is_recent_BT.sum(-1) - all_B1.clamp_max(self.recent)[:, 0]).max())

    def _place_sinks(self, first: int) -> None:
        """Find the first tokens of each sequence; those to come follow one another."""
        if not self.sink:
            return
        assert self.count_BT is not None
        T, sink_S = self.count_BT.shape[1], torch.arange(self.sink, device=self.count_BT.device)
        sink_BS = sink_S.expand(len(self.count_BT), -1).contiguous()
        there_BS = torch.searchsorted(self.count_BT, sink_BS + 1)
        found_BS = torch.where(there_BS < T, there_BS, T + sink_BS - self.count_BT[:, -1:])
        if first and self.sink_BS is not None:
            found_BS = torch.where(self.sink_BS < first, self.sink_BS, found_BS)
        self.sink_BS = found_BS


class Starts:
    """Where the sequences of a static cache start, behind the padding on their left.

    All layers of a cache share them. A sequence that has no token yet starts at the next slot.
    `is_settled`: every sequence has started.
    """

    def __init__(self) -> None:
        self.start_B: Tensor | None = None
        self.is_padded, self.is_settled = False, True

    def sinks(self, count: int) -> Tensor:
        """The slots of the first tokens.  [B|1 S]"""
        if not self.is_padded:
            device = None if self.start_B is None else self.start_B.device
            return torch.arange(count, device=device)[None]
        assert self.start_B is not None
        return self.start_B[:, None] + torch.arange(count, device=self.start_B.device)

    def prepare(self, batch: int, device: torch.device) -> None:
        """Make the tensor, whose address stays for good."""
        if self.start_B is None or self.start_B.shape[0] != batch or self.start_B.device != device:
            self.start_B = torch.zeros(batch, dtype=torch.long, device=device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.start_B)

    def note(self, real_BT: Tensor, first: Tensor | int) -> None:
        """Take in which of the slots from `first` on hold tokens."""
        assert self.start_B is not None
        empty_B = (real_BT.cumsum(-1) == 0).sum(-1)
        self.start_B.copy_(torch.where(self.start_B >= first, first + empty_B, self.start_B))
        self.is_padded = True

    def check(self, real_BT: Tensor, first: int) -> None:
        """Look at what was noted; waits for the device.

        Raises:
            CacheError: there is padding after a sequence's start.
        """
        assert self.start_B is not None
        slot_T = torch.arange(first, first + real_BT.shape[1], device=real_BT.device)
        if bool((~real_BT & (slot_T >= self.start_B[:, None])).any()):
            raise CacheError(
                "a static cache that keeps tokens exact takes padding on the left alone: pad so, "
                "or use LatentCache(model)"
            )
        self.is_settled = bool((self.start_B < first + real_BT.shape[1]).all())

    def cut(self, length: int) -> None:
        """Forget the slots from `length` on."""
        if self.start_B is not None:
            self.start_B.clamp_(max=length)
            self.is_padded = self.is_padded and length > 0
            self.is_settled = not self.is_padded or bool((self.start_B < length).all())

    def select(self, index_B: Tensor) -> None:
        if self.is_padded and self.start_B is not None:
            self.start_B.copy_(self.start_B.index_select(0, index_B.to(self.start_B.device)))
