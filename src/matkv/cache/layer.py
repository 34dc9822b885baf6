"""The latents of one layer, by the protocol of transformers' caches.

Shapes: B batch, G KV head, N heads of one bucket, T token, D head dim, C row columns."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from matkv.cache.exact import ExactTokens
from matkv.cache.padding import Padding, Slots
from matkv.cache.rows import Rows
from matkv.errors import CacheError
from matkv.latents.latents import Exact, Latents
from matkv.latents.layer import LayerProjection, joined
from matkv.latents.narrow import narrowed


class HoldsLatents:
    """What layers of latents have in common, growing or static: they belong to a projection."""

    projection: LayerProjection
    exact: Any
    is_initialized: bool

    @staticmethod
    def note(held: Sequence[Any], seen_BT: Tensor, batch: int, queries: int) -> None:
        """`note_padding` of layers of this kind that keep some tokens exact."""
        raise NotImplementedError

    @property
    def keys(self) -> None:
        """None before the first token, as in any cache, and not there afterwards."""
        if self.is_initialized:
            raise CacheError(
                "the cache holds latents, no keys and values at full width; its nbytes and "
                "used_nbytes tell its size"
            )

    @keys.setter
    def keys(self, states: None) -> None:
        assert states is None  # transformers sets it to None in every new layer

    values = keys

    def emptied(self, projection: LayerProjection) -> Self:
        """A new layer of this kind."""
        raise NotImplementedError

    def follow(self, projection: LayerProjection) -> Self:
        """This layer for the projection that a model has now: a new one if it holds no tokens.

        Tokens of the same bases stay, and others are added at the ranks they have.

        Raises:
            CacheError: it holds tokens of another model or of other bases.
        """
        if not self.get_seq_length():  # type: ignore[attr-defined]
            return self.emptied(projection)
        if self.projection.source != projection.source:
            raise CacheError(
                "the cache holds tokens of another model or of other bases: reset() it or use a "
                "new one"
            )
        if self.projection.identity == projection.identity:
            self.projection = projection
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the tokens; the projection is its model's, copied only together with it."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            is_shared = name == "projection" and id(value) not in memo
            twin.__dict__[name] = value if is_shared else copy.deepcopy(value, memo)
        return twin


class LatentLayer(HoldsLatents, DynamicLayer):  # type: ignore[misc]
    """One layer's latents in `rows`; tokens kept exact are in `exact` as long as they are recent.

    `update` returns a `Latents` twice, in place of full keys and values: transformers passes it on
    untouched to the registered attention function.
    """

    exact: ExactTokens | None
    is_compileable = False
    is_croppable = True

    def __init__(self, projection: LayerProjection, max_cache_len: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.projection = projection
        self.rows = Rows(max_cache_len or 0)
        self.exact = (
            ExactTokens(projection.sink, projection.recent) if projection.keeps_exact else None
        )
        self.length = 0
        self.record_past = False

    def emptied(self, projection: LayerProjection) -> Self:
        layer = self.__class__(projection, self.rows.reserve)
        layer.record_past = self.record_past
        return layer

    # ---- growing

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append new tokens.  [B G T D, B G T D -> (Latents, the same Latents)]"""
        first, exact = self.length, None
        if first and self.buffers[0].shape[0] != key_states.shape[0]:
            raise CacheError(
                f"the cache holds {self.buffers[0].shape[0]} sequences, {key_states.shape[0]} were "
                "given; reset() it or use a new LatentCache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states_BGTF = joined(key_states, value_states)
        if self.exact is not None:
            exact, states_BGTF = self.exact.append(states_BGTF, first, keep_all=self.record_past)
        self.length = first + key_states.shape[2]
        self.rows.append(self.projection.encode_states(states_BGTF))
        latents = self._seen(exact, first)
        return latents, latents

    def _seen(self, exact: Exact | None, first: int) -> Latents:
        """What the queries in the slots from `first` on read."""
        seen = self.length if self.exact is None else self.exact.far(self.length)
        return Latents(self.projection, self.rows.first(seen), exact)

    def activate_past_recording(self) -> None:
        """Keep all new tokens exact until the next `crop`, so that it can roll back.

        And so again after it: generation with drafts asks but once. `reset` ends it.
        """
        self.record_past = True

    def narrow(self, projection: LayerProjection) -> None:
        """Go on at another projection of the same bases, with the tokens held so far.

        Raises:
            CacheError: its bases differ, or the tokens that it keeps exact.
        """
        old = self.projection
        if (old.sink, old.recent) != (projection.sink, projection.recent):
            raise CacheError("a cache shrinks at the same sink and recent: those it was filled at")
        if old.source != projection.source:
            raise CacheError("the cache belongs to other bases: use a new one")
        rows = Rows(self.rows.reserve)
        if self.rows.count:
            held = self.rows.first(self.rows.count)
            rows.append(narrowed(held, old, projection, self.dtype))
        elif self.length:  # all tokens are exact
            sizes = projection.storages(self.dtype)
            batch, like = self.buffers[0].shape[0], self.buffers[0]
            rows.append([like.new_empty(batch, N, 0, C, dtype=dtype) for N, C, dtype in sizes])
        self.rows = rows
        self.projection = projection

    # ---- what generation asks of a layer

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def check_crop(self, removed: int) -> None:
        """Raises:
        CacheError: recent exact tokens that would be needed were already dropped.
        """
        if self.exact is not None:
            self.exact.cropped(self.length, min(removed, self.length))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens.

        Raises:
            CacheError: `tokens_to_remove` is positive, or recent exact tokens were already dropped.
        """
        removed = min(tokens_removed(tokens_to_remove), self.length)
        if self.exact is not None:
            self.exact.crop(self.length, removed)
        self.length -= removed
        self.rows.crop(self._row_count())

    def _row_count(self) -> int:
        """How many tokens have rows."""
        return self.length if self.exact is None else self.exact.between(self.length)

    def reset(self) -> None:
        """Forget all tokens; the buffers are kept for the next sequence."""
        self.length, self.record_past, self.is_initialized = 0, False, False
        self.rows.crop(0)
        if self.exact is not None:
            self.exact.reset()

    def _select(self, index_B: Tensor) -> None:
        index_B = index_B.to(self.buffers[0].device)
        self.rows.select(index_B)
        if self.exact is not None:
            self.exact.select(index_B)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.length:
            self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.length:
            every = torch.arange(self.buffers[0].shape[0], device=indices.device)
            self._select(every[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.length:
            every = torch.arange(self.buffers[0].shape[0], device=self.buffers[0].device)
            self._select(every.repeat_interleave(repeats))

    @staticmethod
    def note(held: Sequence[Any], seen_BT: Tensor, batch: int, queries: int) -> None:
        """See `note_padding`."""
        slots: list[Slots] = [layer.exact.slots for layer in held]
        first: int = held[0].length
        is_settled = queries == 1 and all(places.settled <= first for places in slots)
        real_BQ = seen_BT[:, first : first + queries].expand(batch, -1)
        real_BQ = F.pad(real_BQ, (0, queries - real_BQ.shape[1]))
        if (is_settled and real_BQ.device.type != "cpu") or bool(real_BQ.all()):
            return
        before_BT = slots[0].real(batch, first, real_BQ.device)
        padding = Padding.of(torch.cat((before_BT, real_BQ), dim=1))
        for places in slots:
            places.note(padding, first)

    # ---- moving, and bytes

    @property
    def buffers(self) -> list[Tensor]:
        return self.rows.buffers

    def _tensors(self) -> list[Tensor]:
        return self.buffers + (self.exact.tensors if self.exact is not None else [])

    def _move(self, device: torch.device | str) -> None:
        self.rows.move(device)
        if self.exact is not None:
            self.exact.move(device)

    def offload(self) -> None:
        if self.is_initialized:
            self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens held, without spare room."""
        exact = self.exact.used_nbytes(self.length) if self.exact is not None else 0
        return self.rows.used_nbytes + exact


def tokens_removed(tokens_to_remove: int | Tensor) -> int:
    """How many tokens a `crop` removes; before 5.23, transformers counts them in a tensor.

    Raises:
        CacheError: `tokens_to_remove` is positive.
    """
    if tokens_to_remove > 0:
        raise CacheError(f"crop({tokens_to_remove}): pass the negative number of tokens to remove")
    return -int(tokens_to_remove)


def note_padding(layers: Iterable[Any], seen_BT: Tensor | None, batch: int, queries: int) -> None:
    """Tell layers that keep some tokens exact which of the next `queries` slots are padding.

    `seen_BT` says it of all slots, those further on are padding. On an accelerator single tokens
    are trusted to be none once every sequence has its sinks: looking would wait for the device.
    """
    held = [
        layer for layer in layers if isinstance(layer, HoldsLatents) and layer.exact is not None
    ]
    if held and seen_BT is not None:
        held[0].note(held, seen_BT, batch, queries)
