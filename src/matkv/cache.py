"""The latent cache: transformers' cache interface over packed rows of latents.

Shapes: B batch, G KV head, N heads of one bucket, T token, D head dim, C row columns.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from matkv.attention import Latents
from matkv.errors import CacheError
from matkv.exact_tokens import ExactTokens
from matkv.latents import LayerProjection

# Buffers grow by a quarter and in steps of this many tokens: appending one token copies nothing,
# a token is copied four times in its life, and spare room stays under a quarter.
GRAIN = 64


class LatentLayer(DynamicLayer):
    """One layer's latents: a preallocated buffer [B N capacity C] per bucket of equal row widths.

    Tokens kept exact are in `exact` and get latents when they leave the window.

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
            ExactTokens(projection.sink, projection.window) if projection.keeps_exact else None
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
            if first == 0:
                self.exact.reset()
            exact, states_BGTF = self.exact.append(
                states_BGTF, first, self.projection.start_B, keep_all=self.record_past
            )
        rows, before = self.projection.encode_states(states_BGTF), self.rows
        if first == 0:
            self.buffers = [_reusable(old, new) for old, new in _pair_up(self.buffers, rows)]
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


class LatentCache(Cache):
    """A cache of latents for an attached model, used as `past_key_values`.

    Layers with a sliding window keep transformers' own layer at full width. `max_cache_len`
    reserves room for that many tokens at the first one, so that the buffers never grow.

    Raises:
        CacheError: the model is not attached.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_cache_len: int | None = None,
        offloading: bool = False,
    ) -> None:
        plain = DynamicCache(config=model.config.get_text_config(decoder=True))
        super().__init__(layers=plain.layers, offloading=offloading)
        use_latents(self, model, max_cache_len=max_cache_len)

    def reset(self) -> None:
        """Forget all tokens; latent layers keep their buffers for the next sequence."""
        layers: list[Any] = self.layers
        for layer in layers:
            if not isinstance(layer, LatentLayer):
                # Before transformers 5.23 a full layer zeroes its tokens and goes on after them.
                layer.is_initialized, layer.keys, layer.values = False, None, None
            layer.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all storages the cache holds, spare room included."""
        return storage_nbytes(self)

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens held; equals `RankTable.nbytes` of the attached table."""
        return sum(
            layer.used_nbytes
            if isinstance(layer, LatentLayer)
            else sum(t.numel() * t.element_size() for t in _layer_tensors(layer))
            for layer in self.layers
        )


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache of the kind the model runs with: latent when attached, else a DynamicCache."""
    if attached_projections(model):
        return LatentCache(model)
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.no_grad()
def refill(model: PreTrainedModel, states: Cache) -> Cache:
    """A cache of the kind the model runs with, holding the full keys and values of `states`."""
    cache = new_cache(model)
    for index, layer in enumerate(states.layers):
        keys, values = _layer_tensors(layer)
        cache.update(keys, values, index)
    return cache


def storage_nbytes(cache: Cache) -> int:
    """Bytes of all storages that a latent, dynamic or static cache holds, each counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in _layer_tensors(layer)
    }
    return sum(storages.values())


def use_latents(cache: Cache, model: PreTrainedModel, *, max_cache_len: int | None = None) -> None:
    """Replace the empty growing layers of `cache` by latent ones, in place.

    `model` is the whole model or its decoder.

    Raises:
        CacheError: the model is not attached, or the cache already holds full-width tokens.
    """
    projections = attached_projections(model)
    if not projections:
        raise CacheError("the model has no bases: call matkv.attach(model, artifact, budget) first")
    layers = getattr(cache, "layers", [])
    lazy = getattr(cache, "layer_class_to_replicate", None)  # a DynamicCache() starts empty
    if lazy is not None:
        layers += [lazy() for _ in range(len(layers), max(projections) + 1)]
    for index in projections:
        layer = layers[index] if index < len(layers) else None
        if type(layer) is not DynamicLayer or layer.is_initialized:
            raise CacheError(
                f"layer {index} of the {type(cache).__name__} cannot take latents: pass "
                "past_key_values=matkv.LatentCache(model), or none, to an attached model"
            )
    for index, projection in projections.items():
        cache.layers[index] = LatentLayer(projection, max_cache_len)


def attached_projections(model: PreTrainedModel) -> dict[int, LayerProjection]:
    """The projection of every attached layer, by layer index; empty without `attach`."""
    found: dict[int, LayerProjection] = {}
    for module in model.modules():
        projection = getattr(module, "matkv", None)
        if isinstance(projection, LayerProjection):
            found[int(module.layer_idx)] = projection  # type: ignore[arg-type]
    return found


def _layer_tensors(layer: Any) -> list[Tensor]:
    if hasattr(layer, "_tensors"):  # latents, static or not
        held: list[Tensor] = layer._tensors()
        return held
    return [t for t in (layer.keys, layer.values) if t is not None]


def _reusable(old: Tensor | None, new_BNTC: Tensor) -> Tensor:
    """The old buffer if new rows fit it but for their number, else an empty one."""
    if (
        old is not None
        and (old.shape[0], old.shape[1], old.shape[3])
        == (new_BNTC.shape[0], new_BNTC.shape[1], new_BNTC.shape[3])
        and (old.dtype, old.device) == (new_BNTC.dtype, new_BNTC.device)
        and not old.requires_grad
    ):
        return old
    return new_BNTC[:, :, :0]


def _pair_up(buffers: list[Tensor], rows: list[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    if not buffers:
        return [(None, new) for new in rows]
    return list(zip(buffers, rows, strict=True))
