"""What a cache keeps at full width: the first tokens of a layer, and the last ones.

Shapes: B batch, G KV head, T new token or slot, S sink token, K recent token, D head dim, F = 2 D,
[key | value].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matkv.cache.padding import Padding, holes_among
from matkv.errors import CacheError
from matkv.latents.latents import Exact

# Recent tokens slide through a buffer with room for half as many again and this many, and are moved
# back to its start when they reach the end.
GRAIN = 16


class ExactTokens:
    """The first `sink` tokens and the last `recent` of one layer; none is in both.

    The recent ones are the stretch `held` of a buffer [B G room F], in order. Tokens between are
    latents: those in the slots from `sink` to the last `recent`, with padding too, because what is
    in an earlier slot is a sink or padding. Where padding lies among tokens, `spread` more slots
    are held, so that every sequence has its `recent` tokens.
    """

    def __init__(self, sink: int, recent: int) -> None:
        self.sink, self.recent = sink, recent
        self.sink_BGSF: Tensor | None = None
        self.buffer: Tensor | None = None
        self.held = slice(0, 0)
        self.forget_padding()

    def forget_padding(self) -> None:
        self.sink_BS: Tensor | None = None
        self.count_BT: Tensor | None = None
        self.holes = self.gaps = self.spread = 0
        # From this slot on, no token to come is a sink.
        self.settled = self.sink

    def note(self, padding: Padding, first: int) -> None:
        """Take in where the tokens are; those in the slots from `first` on are yet to come."""
        if self.sink:
            sink_BS = padding.sinks(self.sink)
            if first and self.sink_BS is not None:
                before_BS = self.sink_BS.to(sink_BS.device)
                sink_BS = torch.where(before_BS < first, before_BS, sink_BS)
            self.sink_BS = sink_BS
        self.settled = padding.latest + padding.holes + self.sink
        self.count_BT, self.holes = padding.count_BT, padding.holes
        self.gaps = padding.holes if first else padding.inside
        self._spread_out()

    def real(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Which of the first `length` slots hold tokens.  [BT]"""
        if self.count_BT is None:
            return torch.ones(batch, length, dtype=torch.bool, device=device)
        count_BT = self._counted(length, device)
        return count_BT > F.pad(count_BT, (1, -1))

    @property
    def reach(self) -> int:
        """How many of the last tokens the newest query reads exactly: its own, too."""
        return self.recent + 1 if self.recent else 0

    def between(self, length: int) -> int:
        """How many of `length` tokens are latents in the cache."""
        return max(0, length - self.sink - self.recent)

    def far(self, length: int) -> int:
        """How many of these the newest query reads."""
        return max(0, length - self.sink - self.reach)

    def append(self, new_BGTF: Tensor, first: int, *, keep_all: bool) -> tuple[Exact, Tensor]:
        """Add the tokens in the slots from `first` on.

        Returns what their attention reads exactly, and the tokens that turn into latents. With
        `keep_all` these are kept as well, so that `crop` can bring them back.
        """
        length = first + new_BGTF.shape[2]
        if self.sink_BS is not None:
            self.sink_BS = self.sink_BS.to(new_BGTF.device)
        self._fill_sinks(new_BGTF, first)
        assert self.sink_BGSF is not None
        joined = self._count(self.held) + new_BGTF.shape[2]
        kept = joined if keep_all and self.recent else self._wanted(length)
        recent_BGKF = self._slide(new_BGTF, joined, kept)
        exact = Exact(
            recent_BGKF,
            self.sink_BGSF,
            length,
            self.reach,
            self.sink_BS,
            self._counted(length, new_BGTF.device) if self.holes and self.recent else None,
            self.gaps,
        )
        self.gaps = self.holes
        turned = slice(self.between(first), self.between(length))
        offset = self.sink - exact.first
        return exact, recent_BGKF[:, :, turned.start + offset : turned.stop + offset]

    def crop(self, length: int, removed: int) -> None:
        """Forget the last `removed` of `length` tokens.

        Raises:
            CacheError: tokens that are recent again were already dropped.
        """
        length -= removed
        if length == 0:
            return self.reset()
        if not self.recent:
            return
        if self.count_BT is not None:
            self.count_BT = self._counted(length, self.count_BT.device)
            self._spread_out()
        wanted = self._wanted(length)
        end = max(self.held.start, self.held.stop - removed)
        if end - wanted < self.held.start:
            raise CacheError(
                f"cannot crop {removed} tokens of a cache that keeps {self.recent} exact: call "
                "activate_past_recording() before the tokens are added, or use recent=0"
            )
        self.held = slice(end - wanted, end)

    def reset(self) -> None:
        self.sink_BGSF, self.buffer = None, None
        self.held = slice(0, 0)
        self.forget_padding()

    def select(self, index_B: Tensor) -> None:
        """Keep these sequences, in this order."""
        if self.buffer is None or self.sink_BGSF is None:
            return
        self._store(self.buffer[:, :, self.held].index_select(0, index_B))
        self.sink_BGSF = self.sink_BGSF.index_select(0, index_B)
        if self.sink_BS is not None:
            self.sink_BS = self.sink_BS.index_select(0, index_B)
        if self.count_BT is not None:
            self.count_BT = self.count_BT.index_select(0, index_B)

    def move(self, device: torch.device | str) -> None:
        if self.buffer is not None and self.sink_BGSF is not None:
            self.buffer = self.buffer.to(device, non_blocking=True)
            self.sink_BGSF = self.sink_BGSF.to(device, non_blocking=True)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.sink_BGSF, self.buffer) if tensor is not None]

    def used_nbytes(self, length: int) -> int:
        """Bytes of the tokens held, without spare room."""
        if self.buffer is None:
            return 0
        B, G, _, F = self.buffer.shape
        tokens = min(length, self.sink) + self._count(self.held)
        return B * G * tokens * F * self.buffer.element_size()

    # ---- how

    @staticmethod
    def _count(held: slice) -> int:
        return int(held.stop - held.start)

    def _wanted(self, length: int) -> int:
        """How many of `length` tokens are recent, and no sinks whatever the padding."""
        return min(self.recent + self.spread, max(0, length - self.sink))

    def _spread_out(self) -> None:
        """Learn how many slots more than `recent` are needed for as many tokens."""
        assert self.count_BT is not None
        matters = self.recent > 0 and self.holes > 0
        self.spread = holes_among(self.count_BT, self.recent) if matters else 0

    def _counted(self, length: int, device: torch.device) -> Tensor:
        """The count of tokens, with one more for every slot that nothing was noted of."""
        assert self.count_BT is not None
        count_BT = self.count_BT.to(device)[:, :length]
        more_T = torch.arange(1, length - count_BT.shape[1] + 1, device=device)
        self.count_BT = torch.cat((count_BT, count_BT[:, -1:] + more_T), dim=1)
        return self.count_BT

    def _slide(self, new_BGTF: Tensor, joined: int, kept: int) -> Tensor:
        """Append, then keep the last `kept`; returns all that were held and the new.  [BGKF]"""
        buffer, end = self.buffer, self.held.stop + new_BGTF.shape[2]
        if buffer is not None and end <= buffer.shape[2] and _is_writable(buffer, new_BGTF):
            buffer[:, :, self.held.stop : end] = new_BGTF
            recent_BGKF = buffer[:, :, end - joined : end]
            self.held = slice(end - kept, end)
            return recent_BGKF
        recent_BGKF = new_BGTF
        if buffer is not None and joined > new_BGTF.shape[2]:
            recent_BGKF = torch.cat((buffer[:, :, self.held], new_BGTF), dim=2)
        self._store(recent_BGKF[:, :, joined - kept :])
        return recent_BGKF

    def _store(self, kept_BGKF: Tensor) -> None:
        B, G, kept, F = kept_BGKF.shape
        self.held = slice(0, kept)
        if kept_BGKF.requires_grad:
            self.buffer = kept_BGKF
            return
        room = kept + kept // 2 + GRAIN if self.recent else 0
        self.buffer = kept_BGKF.new_empty(B, G, room, F)
        self.buffer[:, :, :kept] = kept_BGKF

    def _fill_sinks(self, new_BGTF: Tensor, first: int) -> None:
        """Put those of the new tokens that are sinks into their slots."""
        B, G, tokens, F = new_BGTF.shape
        if self.sink_BGSF is None:
            self.sink_BGSF = new_BGTF.new_zeros(B, G, self.sink, F)
        if first >= self.settled:
            return
        sink_BS = torch.arange(self.sink, device=new_BGTF.device).expand(B, -1)
        offset_BS = (sink_BS if self.sink_BS is None else self.sink_BS) - first
        is_new_BS = (offset_BS >= 0) & (offset_BS < tokens)
        picks_BGSF = offset_BS.clamp(0, tokens - 1)[:, None, :, None].expand_as(self.sink_BGSF)
        new_BGSF = new_BGTF.gather(2, picks_BGSF)
        self.sink_BGSF = torch.where(is_new_BS[:, None, :, None], new_BGSF, self.sink_BGSF)


def _is_writable(buffer: Tensor, new_BGTF: Tensor) -> bool:
    """Not where a graph needs earlier tokens, nor a buffer made in a mode that is over."""
    is_frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
    return not (is_frozen or buffer.requires_grad or new_BGTF.requires_grad)
