"""The latents of one layer.

Shapes: B batch, G KV head, N heads of one bucket, T token, D head dim, C row columns."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from matkv.cache.exact import ExactTokens
from matkv.cache.padding import Padding, new_tokens
from matkv.cache.rows import GRAIN, pair_up, reusable
from matkv.errors import CacheError
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection


class LatentLayer(DynamicLayer):
    """One layer's latents: a preallocated buffer [B N capacity C] per bucket of equal row widths.

    Tokens kept exact are in `exact` and get latents when they are recent no more.

    `update` returns a `Latents` twice, in place of full keys and values: transformers passes it on
    untouched to the registered attention function.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, projection: LayerProjection, max_cache_len: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.projection = projection
        self.reserve = max_cache_len or 0
        self.buffers: list[Tensor] = []
        self.exact = (
            ExactTokens(projection.sink, projection.recent) if projection.keeps_exact else None
        )
        self.length = 0
        self.record_past = False

    # ---- growing

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append new tokens.  [B G T D, B G T D -> (Latents, the same Latents)]"""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, exact = self.length, None
        if first and self.buffers[0].shape[0] != key_states.shape[0]:
            raise CacheError(
                f"the cache holds {self.buffers[0].shape[0]} sequences, {key_states.shape[0]} were "
                "given; reset() it or use a new LatentCache"
            )
        states_BGTF = torch.cat((key_states, value_states), dim=-1)
        if self.exact is not None:
            exact, states_BGTF = self.exact.append(states_BGTF, first, keep_all=self.record_past)
        rows, before = self.projection.encode_states(states_BGTF), self.rows
        if first == 0:
            self.buffers = [reusable(old, new) for old, new in pair_up(self.buffers, rows)]
        self.length = first + key_states.shape[2]
        self.buffers = [
            self._append(buffer, new, before)
            for buffer, new in zip(self.buffers, rows, strict=True)
        ]
        seen = self.length if self.exact is None else self.exact.far(self.length)
        latents = Latents(self.projection, [buffer[:, :, :seen] for buffer in self.buffers], exact)
        return latents, latents

    def _append(self, buffer: Tensor, new_BNTC: Tensor, first: int) -> Tensor:
        if new_BNTC.requires_grad or buffer.requires_grad:
            # Writing in place would break the graph of earlier tokens.
            return torch.cat((buffer[:, :, :first], new_BNTC), dim=2)
        B, N, tokens, C = new_BNTC.shape
        capacity, end = buffer.shape[2], first + tokens
        is_frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
        if end > capacity or (is_frozen and tokens):
            wanted = max(end, capacity + capacity // 4, self.reserve)
            grown = new_BNTC.new_empty(B, N, -(-wanted // GRAIN) * GRAIN, C)
            grown[:, :, :first] = buffer[:, :, :first]
            buffer = grown
        buffer[:, :, first:end] = new_BNTC
        return buffer

    def activate_past_recording(self) -> None:
        """Keep more recent tokens exact until the next `crop`, so that it can roll back."""
        self.record_past = True

    @property
    def rows(self) -> int:
        """How many of the tokens are latents."""
        return self.length if self.exact is None else self.exact.between(self.length)

    # ---- what generation asks of a layer

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens.

        Raises:
            CacheError: `tokens_to_remove` is positive, or recent exact tokens were already dropped.
        """
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop({tokens_to_remove}): pass the negative number of tokens to remove"
            )
        removed = min(-tokens_to_remove, self.length)
        if self.exact is not None:
            self.exact.crop(self.length, removed)
        self.length -= removed

    def reset(self) -> None:
        """Forget all tokens; the buffers are kept for the next sequence."""
        self.length, self.record_past = 0, False
        if self.exact is not None:
            self.exact.reset()

    def _select(self, index_B: Tensor) -> None:
        index_B, buffers = index_B.to(self.buffers[0].device), []
        for buffer in self.buffers:
            used = buffer[:, :, : self.rows].index_select(0, index_B)
            moved = used.new_empty(used.shape[0], used.shape[1], *buffer.shape[2:])
            moved[:, :, : self.rows] = used
            buffers.append(moved)
        self.buffers = buffers
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

    # ---- moving and copying

    def _tensors(self) -> list[Tensor]:
        return self.buffers + (self.exact.tensors if self.exact is not None else [])

    def _move(self, device: torch.device | str) -> None:
        self.buffers = [buffer.to(device, non_blocking=True) for buffer in self.buffers]
        if self.exact is not None:
            self.exact.move(device)

    def offload(self) -> None:
        if self.is_initialized:
            self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentLayer:
        """A copy of the tokens; the projection, which belongs to the model, is shared."""
        memo[id(self.projection)] = self.projection
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(v, memo) for name, v in self.__dict__.items()})
        return twin

    # ---- bytes

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens held, without spare room."""
        rows = sum(b[:, :, : self.rows].numel() * b.element_size() for b in self.buffers)
        return rows + (self.exact.used_nbytes(self.length) if self.exact is not None else 0)


def note_padding(layers: Iterable[Any], mask: Any, batch: int, queries: int) -> None:
    """Tell layers that keep some tokens exact which of the next `queries` slots are padding.

    `mask` is one that a decoder takes, see `new_tokens`. On an accelerator single tokens are
    trusted to be no padding once every sequence has its sinks: looking would wait for the device.
    """
    held = [layer for layer in layers if isinstance(layer, LatentLayer)]
    exact = [layer.exact for layer in held if layer.exact is not None]
    if not exact:
        return
    first = held[0].length
    real_BQ = new_tokens(mask, batch, first, queries)
    is_settled = queries == 1 and all(tokens.settled <= first for tokens in exact)
    if real_BQ is None or (is_settled and real_BQ.device.type != "cpu") or bool(real_BQ.all()):
        return
    padding = Padding.of(torch.cat((exact[0].real(batch, first, real_BQ.device), real_BQ), dim=1))
    for tokens in exact:
        tokens.note(padding, first)
