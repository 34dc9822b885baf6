"""The latents of one layer in tensors whose shapes and addresses never change.

What `torch.compile` and CUDA graphs ask for: attention reads the whole buffer at every step, and
masks hide what is not yet written, as with transformers' StaticCache.

Shapes: B batch, G KV head, N heads of one bucket, T token, R row, D head dim, C row columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import StaticLayer

from matkv.cache.layer import HoldsLatents, tokens_removed
from matkv.cache.padding import Starts
from matkv.cache.ring import ExactRing
from matkv.errors import CacheError
from matkv.latents.latents import Fixed, Latents
from matkv.latents.layer import LayerProjection, joined


class StaticLatentLayer(HoldsLatents, StaticLayer):  # type: ignore[misc]
    """A buffer [B N R C] per bucket of equal row widths, allocated at the first token.

    R is `max_cache_len` but for the tokens that are exact, see `ExactRing`, which has places for
    `rollback` more.
    """

    exact: ExactRing | None

    def __init__(
        self,
        projection: LayerProjection,
        max_cache_len: int,
        *,
        rollback: int = 0,
        starts: Starts | None = None,
    ) -> None:
        super().__init__(max_cache_len)
        self.projection, self.rollback = projection, rollback
        self.starts = Starts() if starts is None else starts
        sink, recent = projection.sink, projection.recent
        self.exact = None
        if projection.keeps_exact:
            self.exact = ExactRing(sink, recent, max_cache_len, rollback)
        self.room = max(0, max_cache_len - sink - recent)
        self.buffers: list[Tensor] = []

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.exact is None or not self.exact.recent or self.rollback > 0

    def emptied(self, projection: LayerProjection) -> Self:
        return self.__class__(
            projection, self.max_cache_len, rollback=self.rollback, starts=self.starts
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.buffers = [
            key_states.new_zeros(self.batch_size, heads, self.room, columns, dtype=dtype)
            for heads, columns, dtype in self.projection.storages(key_states.dtype)
        ]
        if self.exact is not None:
            self.exact.allocate(joined(key_states, value_states))
            self.starts.prepare(self.batch_size, self.device)
        if not torch.compiler.is_compiling():
            for tensor in (*self._tensors(), self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    # ---- adding tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write new tokens after the others.  [B G T D, B G T D -> (Latents, the same Latents)]

        Raises:
            CacheError: there is no room for them, or the buffers' dtype is not theirs.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states_BGTF = joined(key_states, value_states)
        if torch.promote_types(self.dtype, states_BGTF.dtype) != self.dtype:
            raise CacheError(
                f"a static cache filled in {self.dtype} cannot take {states_BGTF.dtype}: use "
                "one dtype throughout, or LatentCache(model)"
            )
        # How many tokens there are is asked only where that spares attention over empty room.
        is_known = not torch.compiler.is_compiling() and (
            states_BGTF.shape[2] > 1 or self.device.type == "cpu"
        )
        first = int(self.cumulative_length) if is_known else None
        if first is not None and first + states_BGTF.shape[2] > self.max_cache_len:
            raise CacheError(
                f"a static cache with room for {self.max_cache_len} tokens holds {first}, and "
                f"{states_BGTF.shape[2]} more were given: make it with a larger max_cache_len"
            )
        if first is not None and states_BGTF.shape[2] > 1:
            latents = self._append_known(states_BGTF, first)
        else:
            latents = self._append(states_BGTF)
        return latents, latents

    def _append_known(self, states_BGTF: Tensor, first: int) -> Latents:
        """Several tokens: attention reads what has been written, as from a growing cache."""
        end, exact, begin, seen = first + states_BGTF.shape[2], None, first, None
        if self.exact is not None:
            exact, states_BGTF = self.exact.append_known(states_BGTF, first, self.starts)
            begin, seen = self.exact.between(first), self.exact.far(end)
        self.cumulative_length.fill_(end)
        written = slice(begin, begin + states_BGTF.shape[2])
        for buffer, rows_BNTC in zip(self.buffers, self._rows(states_BGTF), strict=True):
            buffer[:, :, written] = rows_BNTC
        rows = [buffer[:, :, : end if seen is None else seen] for buffer in self.buffers]
        return Latents(self.projection, rows, exact, has_room=True)

    def _append(self, states_BGTF: Tensor) -> Latents:
        """Any number of tokens, in shapes that are always the same."""
        slot_T = torch.arange(states_BGTF.shape[2], device=self.device) + self.cumulative_length
        row_T, fixed = slot_T, None
        self.cumulative_length.add_(len(slot_T))
        columns_BGCF, place_C = states_BGTF[:, :, :0], slot_T[:0]
        sink = reach = 0
        if self.exact is not None:
            columns_BGCF, place_C, states_BGTF = self.exact.append(states_BGTF, slot_T, self.starts)
            sink, reach = self.projection.sink, self.exact.reach
            row_T = slot_T - sink - self.projection.recent
        sink_BS = self.starts.sinks(0 if self.exact is None else self.exact.sinks)
        self._write(states_BGTF, row_T)
        fixed = Fixed(
            columns_BGCF, sink_BS, place_C, slot_T, self.max_cache_len, reach=reach, sink=sink
        )
        return Latents(self.projection, self.buffers, fixed=fixed)

    def _write(self, states_BGTF: Tensor, row_T: Tensor) -> None:
        """Write rows; those below zero, which are of no token, to where none has been yet."""
        kept = min(self.room, len(row_T))
        if not kept:
            return
        row_T = row_T[-kept:]
        row_T = torch.where(row_T < 0, row_T % self.room, row_T)
        rows = self._rows(states_BGTF[:, :, -kept:])
        for buffer, rows_BNTC in zip(self.buffers, rows, strict=True):
            buffer.index_copy_(2, row_T, rows_BNTC)

    def _rows(self, states_BGTF: Tensor) -> list[Tensor]:
        rows = self.projection.encode_states(states_BGTF)
        return [new.to(held.dtype) for held, new in zip(self.buffers, rows, strict=True)]

    @staticmethod
    def note(held: Sequence[Any], seen_BT: Tensor, batch: int, queries: int) -> None:
        """See `note_padding`. Single tokens are trusted to be none in a graph, too."""
        layer, starts = held[0], held[0].starts
        is_compiling = torch.compiler.is_compiling()
        is_looked_at = not is_compiling and (queries > 1 or seen_BT.device.type == "cpu")
        if queries == 1 and not is_looked_at and starts.is_settled:
            return
        slot_Q = torch.arange(queries, device=seen_BT.device)
        slot_Q = slot_Q + layer.cumulative_length.to(seen_BT.device)
        if not is_compiling:
            seen_BT = F.pad(seen_BT, (0, max(0, int(slot_Q[-1]) + 1 - seen_BT.shape[1])))
        real_BQ = seen_BT.index_select(1, slot_Q).expand(batch, -1)
        if not is_compiling and bool(real_BQ.all()):
            return
        starts.prepare(batch, seen_BT.device)
        starts.note(real_BQ, slot_Q[0])
        if not is_compiling:
            starts.check(real_BQ, int(slot_Q[0]))

    # ---- what generation asks of a layer

    def check_crop(self, removed: int) -> None:
        """Raises:
        CacheError: recent exact tokens that would be needed have left the ring.
        """
        if self.exact is not None:
            length = int(self.get_seq_length())
            self.exact.check_crop(length, min(removed, length))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens: later ones are written over them.

        Raises:
            CacheError: `tokens_to_remove` is positive, or recent exact tokens have left the ring.
        """
        removed = tokens_removed(tokens_to_remove)
        self.check_crop(removed)
        length = int(self.get_seq_length())
        if self.exact is not None:
            self.exact.crop(length)
            self.starts.cut(max(0, length - removed))
        self.cumulative_length.sub_(removed).clamp_(min=0)

    def reset(self) -> None:
        self.cumulative_length.zero_()
        self.starts.cut(0)
        if self.exact is not None:
            self.exact.highest = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute sequences; `StaticLatentCache` does so with their starts."""
        for buffer in self._tensors():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def offload(self) -> None:
        raise CacheError("a static cache stays on its device: use LatentCache(model) to offload")

    def prefetch(self) -> None:
        pass

    def _tensors(self) -> list[Tensor]:
        return self.buffers + ([] if self.exact is None else self.exact.tensors)
