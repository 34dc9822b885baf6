"""What a static cache keeps at full width: sinks, and a ring of the last tokens.

Shapes: B batch, G KV head, T new token, S sink token, K token of the ring, C all exact columns,
F = 2 D, [key | value].
"""

from __future__ import annotations

import torch
from torch import Tensor

from matkv.cache.exact import Split
from matkv.cache.padding import Starts
from matkv.errors import CacheError
from matkv.latents.latents import Exact


class ExactRing(Split):
    """The first `sink` and the last `recent` tokens of a layer with room for `room` tokens.

    The token in the slot t is in the place t mod K of the ring, until a later one takes it. With
    `rollback` more places, so many tokens can be cropped.
    """

    def __init__(self, sink: int, recent: int, room: int, rollback: int) -> None:
        super().__init__(sink, recent)
        self.sinks = min(sink, room)
        self.places = min(recent + rollback, room - self.sinks) if recent else 0
        self.highest = 0
        self.sink_BGSF: Tensor | None = None
        self.ring_BGKF: Tensor | None = None

    def allocate(self, states_BGTF: Tensor) -> None:
        B, G, _, F = states_BGTF.shape
        self.sink_BGSF = states_BGTF.new_zeros(B, G, self.sinks, F)
        self.ring_BGKF = states_BGTF.new_zeros(B, G, self.places, F)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.sink_BGSF, self.ring_BGKF) if tensor is not None]

    # ---- adding tokens

    def append_known(self, new_BGTF: Tensor, first: int, starts: Starts) -> tuple[Exact, Tensor]:
        """Add tokens in the slots from `first` on, a number that is known.

        Returns what their attention reads exactly, and the tokens that turn into latents.
        """
        sink_BGSF, ring_BGKF = self._held()
        end = first + new_BGTF.shape[2]
        sink_BS = starts.sinks(self.sinks)
        if self.sinks and (starts.is_padded or first < self.sinks):
            self._fill_sinks(new_BGTF, sink_BS - first)
        held = min(first, self.places)
        joined_BGTF = new_BGTF.to(ring_BGKF.dtype)
        if held:
            place_K = torch.arange(first - held, first, device=new_BGTF.device) % self.places
            joined_BGTF = torch.cat((ring_BGKF.index_select(2, place_K), joined_BGTF), dim=2)
        kept = min(self.places, new_BGTF.shape[2])
        if kept:
            place_K = torch.arange(end - kept, end, device=new_BGTF.device) % self.places
            ring_BGKF.index_copy_(2, place_K, joined_BGTF[:, :, -kept:])
        exact = Exact(
            joined_BGTF,
            sink_BGSF,
            end,
            self.reach,
            sink_BS=sink_BS if starts.is_padded and self.sinks else None,
        )
        offset = self.sink - exact.first
        return exact, joined_BGTF[:, :, self.between(first) + offset : self.between(end) + offset]

    def append(
        self, new_BGTF: Tensor, slot_T: Tensor, starts: Starts
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add tokens in the slots `slot_T`, whose numbers are not known.

        Returns the exact tokens that their attention reads, sinks, ring and new ones; the slots of
        all but the sinks, below zero where there is no token yet; and as many tokens as there are
        new ones, those in the slots `slot_T - recent`, of which some are none.  [BGCF, C, BGTF]
        """
        sink_BGSF, ring_BGKF = self._held()
        new_BGTF, tokens, K = new_BGTF.to(ring_BGKF.dtype), new_BGTF.shape[2], self.places
        first = slot_T[:1]
        if self.sinks:
            self._fill_sinks(new_BGTF, starts.sinks(self.sinks) - first)
        place_C, joined_BGCF = slot_T, new_BGTF
        leaving_BGTF = new_BGTF
        if K:
            place_K = torch.arange(K, device=slot_T.device)
            place_C = torch.cat((first - 1 - (first - 1 - place_K) % K, slot_T))
            joined_BGCF = torch.cat((ring_BGKF, new_BGTF), dim=2)
            leaving_T = slot_T - self.recent
            where_T = torch.where(leaving_T < first, leaving_T % K, leaving_T - first + K)
            leaving_BGTF = joined_BGCF.index_select(2, where_T)
            kept = min(K, tokens)
            ring_BGKF.index_copy_(2, slot_T[-kept:] % K, new_BGTF[:, :, -kept:])
        return torch.cat((sink_BGSF, joined_BGCF), dim=2), place_C, leaving_BGTF

    def _fill_sinks(self, new_BGTF: Tensor, offset_BS: Tensor) -> None:
        """Put those of the new tokens that are sinks into their places."""
        assert self.sink_BGSF is not None
        tokens = new_BGTF.shape[2]
        is_new_BS = (offset_BS >= 0) & (offset_BS < tokens)
        picks_BGSF = offset_BS.clamp(0, tokens - 1)[:, None, :, None].expand_as(self.sink_BGSF)
        picked_BGSF = new_BGTF.to(self.sink_BGSF.dtype).gather(2, picks_BGSF)
        self.sink_BGSF.copy_(torch.where(is_new_BS[:, None, :, None], picked_BGSF, self.sink_BGSF))

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.sink_BGSF is not None and self.ring_BGKF is not None
        return self.sink_BGSF, self.ring_BGKF

    # ---- forgetting

    def check_crop(self, length: int, removed: int) -> None:
        """Raises:
        CacheError: tokens that are recent again have left the ring.
        """
        left = length - removed
        lost = max(length, self.highest) - self.places  # what is in earlier slots has left
        if self.recent and left and max(left - self.recent, self.sinks) < lost:
            raise CacheError(
                f"cannot crop {removed} tokens of a static cache that keeps {self.recent} exact: "
                f"make it as StaticLatentCache(model, max_cache_len, rollback={removed})"
            )

    def crop(self, length: int) -> None:
        """Note that tokens are forgotten of `length`."""
        self.highest = max(length, self.highest)
