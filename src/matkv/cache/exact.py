"""What a cache keeps at full width: the first tokens of a layer, and the last ones.

Shapes: B batch, G KV head, T new token or slot, S sink token, K recent token, D head dim, F = 2 D,
[key | value].
"""

from __future__ import annotations

import torch
from torch import Tensor

from matkv.cache.padding import Slots
from matkv.errors import CacheError
from matkv.latents.latents import Exact

# Recent tokens slide through a buffer with room for half as many again and this many, and are moved
# back to its start when they reach the end.
GRAIN = 16


class Split:
    """Which tokens of one layer are exact: the first `sink` and the last `recent`."""

    def __init__(self, sink: int, recent: int) -> None:
        self.sink, self.recent = sink, recent

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


class ExactTokens(Split):
    """The first `sink` tokens and the last `recent` of one layer; none is in both.

    The recent ones are the stretch `held` of a buffer [B G room F], in order. Tokens between are
    latents: those in the slots from `sink` to the last `recent`, with padding too, because what is
    in an earlier slot is a sink or padding. Where padding lies among tokens, more slots are held,
    so that every sequence has its `recent` tokens.
    """

    def __init__(self, sink: int, recent: int) -> None:
        super().__init__(sink, recent)
        self.sink_BGSF: Tensor | None = None
        self.buffer: Tensor | None = None
        self.held = slice(0, 0)
        self.slots = Slots(sink, recent)

    def append(self, new_BGTF: Tensor, first: int, *, keep_all: bool) -> tuple[Exact, Tensor]:
        """Add the tokens in the slots from `first` on.

        Returns what their attention reads exactly, and the tokens that turn into latents. With
        `keep_all` these are kept as well, so that `crop` can bring them back.
        """
        length, slots = first + new_BGTF.shape[2], self.slots
        slots.move(new_BGTF.device)
        self._fill_sinks(new_BGTF, first)
        assert self.sink_BGSF is not None
        joined = self._count(self.held) + new_BGTF.shape[2]
        kept = joined if keep_all and self.recent else self._wanted(length, slots.spread)
        recent_BGKF = self._slide(new_BGTF, joined, kept)
        dtype = torch.promote_types(self.sink_BGSF.dtype, recent_BGKF.dtype)
        self.sink_BGSF, recent_BGKF = self.sink_BGSF.to(dtype), recent_BGKF.to(dtype)
        exact = Exact(
            recent_BGKF,
            self.sink_BGSF,
            length,
            self.reach,
            sink_BS=slots.sink_BS,
            count_BT=slots.counted(length) if slots.holes and self.recent else None,
            gaps=slots.gaps,
        )
        slots.gaps = slots.holes
        turned = slice(self.between(first), self.between(length))
        offset = self.sink - exact.first
        return exact, recent_BGKF[:, :, turned.start + offset : turned.stop + offset]

    def cropped(self, length: int, removed: int) -> slice:
        """The recent tokens that are left without the last `removed` of `length`.

        Raises:
            CacheError: tokens that are recent again were already dropped.
        """
        if not self.recent or removed == length:
            return slice(0, 0)
        wanted = self._wanted(length - removed, self.slots.spread_at(length - removed))
        end = max(self.held.start, self.held.stop - removed)
        if end - wanted < self.held.start:
            raise CacheError(
                f"cannot crop {removed} tokens of a cache that keeps {self.recent} exact: call "
                "activate_past_recording() before the tokens are added, or use recent=0"
            )
        return slice(end - wanted, end)

    def crop(self, length: int, removed: int) -> None:
        """Forget the last `removed` of `length` tokens.

        Raises:
            CacheError: tokens that are recent again were already dropped.
        """
        self.held = self.cropped(length, removed)
        if removed == length:
            self.reset()
        else:
            self.slots.cut(length - removed)

    def reset(self) -> None:
        self.sink_BGSF, self.buffer = None, None
        self.held = slice(0, 0)
        self.slots = Slots(self.sink, self.recent)

    def select(self, index_B: Tensor) -> None:
        """Keep these sequences, in this order."""
        if self.buffer is None or self.sink_BGSF is None:
            return
        self._store(self.buffer[:, :, self.held].index_select(0, index_B))
        self.sink_BGSF = self.sink_BGSF.index_select(0, index_B)
        self.slots.select(index_B)

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

    def _wanted(self, length: int, spread: int) -> int:
        """How many of `length` slots are held, and no sinks whatever the padding."""
        return min(self.recent + spread, max(0, length - self.sink))

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
        if first >= self.slots.settled:
            return
        sink_BS = torch.arange(self.sink, device=new_BGTF.device).expand(B, -1)
        offset_BS = (sink_BS if self.slots.sink_BS is None else self.slots.sink_BS) - first
        is_new_BS = (offset_BS >= 0) & (offset_BS < tokens)
        picks_BGSF = offset_BS.clamp(0, tokens - 1)[:, None, :, None].expand_as(self.sink_BGSF)
        new_BGSF = new_BGTF.gather(2, picks_BGSF)
        self.sink_BGSF = torch.where(is_new_BS[:, None, :, None], new_BGSF, self.sink_BGSF)


def _is_writable(buffer: Tensor, new_BGTF: Tensor) -> bool:
    """Not where a graph needs earlier tokens, nor a buffer of another mode or a lesser dtype."""
    is_frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
    is_frozen |= torch.promote_types(buffer.dtype, new_BGTF.dtype) != buffer.dtype
    return not (is_frozen or buffer.requires_grad or new_BGTF.requires_grad)
