"""The latent cache: transformers' cache interface over packed rows of latents.

Shapes: B batch, G KV head, N heads of one bucket, T token, D head dim, C row columns.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from matkv.cache.layer import HoldsLatents, LatentLayer, tokens_removed
from matkv.cache.naming import cache_argument
from matkv.cache.seats import Seats
from matkv.cache.static import StaticLatentLayer
from matkv.errors import CacheError
from matkv.latents.layer import LayerProjection

logger = logging.getLogger(__name__)


class LatentCache(DynamicCache):
    """A cache of latents for an attached model, to generate with.

    Layers with a sliding window that are not compressed keep transformers' own layer at full width.
    `max_cache_len` reserves room for that many tokens at the first one, so that the buffers never
    grow.

    Raises:
        CacheError: the model is not attached.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_cache_len: int | None = None,
        offloading: bool = False,
    ) -> None:
        config = decoder_config(model)
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=True)
        use_latents(self, model, max_cache_len=max_cache_len)

    def reset(self) -> None:
        """Forget all tokens; latent layers keep their buffers for the next sequence."""
        layers: list[Any] = self.layers
        for layer in layers:
            if not isinstance(layer, LatentLayer):
                # Before transformers 5.23 a full layer zeroes its tokens and goes on after them.
                layer.is_initialized, layer.keys, layer.values = False, None, None
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens of every layer, or of none.

        Raises:
            CacheError: `tokens_to_remove` is positive, or a layer has dropped what it would need.
        """
        removed = min(tokens_removed(tokens_to_remove), self.get_seq_length())
        if not self.get_seq_length():
            return  # transformers' layers look for tokens
        layers: list[Any] = self.layers
        if not removed:  # but what was kept to be taken back
            layers = [layer for layer in layers if getattr(layer, "record_past", False)]
        for layer in layers:
            if isinstance(layer, LatentLayer):
                layer.check_crop(removed)
            elif isinstance(layer, DynamicSlidingWindowLayer):
                _check_sliding(layer, removed)
        for layer in layers:
            layer.crop(-removed)

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


class StaticLatentCache(Cache):
    """A cache of latents for an attached model with room for `max_cache_len` tokens, for good.

    Layers with a sliding window that are not compressed are transformers' own static ones, at full
    width; those that are have room for as many tokens as all others, and what is before the window
    is hidden. Where the model keeps recent tokens exact, room is made for `rollback` more of them:
    so many can be cropped.

    Raises:
        CacheError: the model is not attached, or a number is not positive.
    """

    def __init__(self, model: nn.Module, max_cache_len: int, *, rollback: int = 0) -> None:
        if max_cache_len < 1 or rollback < 0:
            raise CacheError(
                f"max_cache_len {max_cache_len} and rollback {rollback} must be numbers of tokens: "
                "at least one, and none or more"
            )
        text = decoder_config(model)
        super().__init__(layers=StaticCache(config=text, max_cache_len=max_cache_len).layers)
        use_latents(self, model, rollback=rollback)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens of every layer, or of none.

        Raises:
            CacheError: `tokens_to_remove` is positive, a layer has a sliding window, or has dropped
                what it would need.
        """
        removed = tokens_removed(tokens_to_remove)
        for layer in self.layers:
            if not isinstance(layer, StaticLatentLayer):
                raise CacheError(
                    "a static cache with a sliding window cannot be cropped: use LatentCache(model)"
                )
            layer.check_crop(removed)
        super().crop(-removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute sequences, in place."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        held = next(layer for layer in self.layers if isinstance(layer, StaticLatentLayer))
        held.starts.select(beam_idx)  # which all layers share

    @property
    def nbytes(self) -> int:
        """Bytes of all storages the cache holds, room for later tokens included."""
        return storage_nbytes(self)


def new_cache(model: nn.Module) -> Cache:
    """An empty cache of the kind the model runs with: latent when attached, else a DynamicCache."""
    if attached_projections(model):
        return LatentCache(model)
    return DynamicCache(config=decoder_config(model))


@torch.no_grad()
def refill(model: nn.Module, states: Cache) -> Cache:
    """A cache of the kind the model runs with, holding the full keys and values of `states`.

    Raises:
        CacheError: the window of a compressed layer has passed some of them.
    """
    cache = new_cache(model)
    held: list[Any] = states.layers
    for index, layer in enumerate(held):
        keys, values = _layer_tensors(layer)
        cache.update(keys, values, index)
        length = layer.get_seq_length()
        filled: Any = cache.layers[index]
        if isinstance(filled, DynamicSlidingWindowLayer):
            filled.cumulative_length = length
        elif filled.get_seq_length() != length:
            raise CacheError(
                f"layer {index} has a sliding window, and holds {keys.shape[2]} of {length} "
                "tokens: let the attached model read them itself"
            )
    return cache


def storage_nbytes(cache: Cache) -> int:
    """Bytes of all storages that a latent, dynamic or static cache holds, each counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in _layer_tensors(layer)
    }
    return sum(storages.values())


def use_latents(
    cache: Cache, model: nn.Module, *, max_cache_len: int | None = None, rollback: int = 0
) -> None:
    """Give `cache` latent layers of the model's attachment where it grows, in place.

    Layers without tokens are replaced; latent ones with tokens of the same bases stay as they are.
    Nothing changes on errors, nor where none of the layers that the model runs is compressed: early
    exit runs the first ones alone. `model` is the whole model or its decoder.

    Raises:
        CacheError: the model is not attached, or the cache holds full-width tokens, or latents of
            another model or of other bases.
    """
    if _is_seated(cache, model):
        return
    projections = attached_projections(model)
    if not projections:
        if any(isinstance(part, LayerProjection) for part in model.modules()):
            return
        raise CacheError("the model has no bases: call matkv.attach(model, artifact, budget) first")
    layers: list[Any] = getattr(cache, "layers", [])
    lazy = getattr(cache, "layer_class_to_replicate", None)
    if lazy is not None:  # a DynamicCache() starts empty
        layers = layers + [lazy() for _ in range(len(layers), max(projections) + 1)]
    latent = {index for index, layer in enumerate(layers) if isinstance(layer, HoldsLatents)}
    room = max((one.max_cache_len for one in layers if isinstance(one, StaticLayer)), default=0)
    make = Seats(max_cache_len, room, rollback)
    seats: dict[int, Any] = {}
    for index in sorted(latent | set(projections)):
        layer = layers[index] if index < len(layers) else None
        projection = projections.get(index)
        seat = None if projection is None else make.take(layer, projection)
        if seat is None:
            raise CacheError(
                f"layer {index} of the {type(cache).__name__} cannot take latents: pass "
                "matkv.LatentCache(model), or none, to an attached model"
            )
        seats[index] = seat
    cache.layers = [seats.get(index, layer) for index, layer in enumerate(layers)]
    if type(cache) is DynamicCache:
        cache.__class__ = LatentCache
    elif type(cache) is StaticCache:
        cache.__class__ = StaticLatentCache  # type: ignore[assignment]
    _warn_once(cache, projections)


def _is_seated(cache: Cache, model: nn.Module) -> bool:
    """Whether the latent layers of `cache` are of the model's attachment: all are if one is."""
    layers = getattr(cache, "layers", [])
    held = next((layer for layer in layers if isinstance(layer, HoldsLatents)), None)
    if held is None:
        return False
    here = next((part for part in model.modules() if isinstance(part, LayerProjection)), None)
    return held.projection is here


def _warn_once(cache: Any, projections: dict[int, LayerProjection]) -> None:
    """Tell that a cache with tokens goes on at ranks that the model no longer has."""
    is_stale = any(cache.layers[i].projection is not one for i, one in projections.items())
    if is_stale and not getattr(cache, "is_stale", False):
        cache.is_stale = True
        logger.warning(
            "the cache goes on at the ranks it was filled at, not those the model is attached at "
            "now: reset() it to follow the model"
        )


def attached_projections(model: nn.Module) -> dict[int, LayerProjection]:
    """The projection of every attached layer that the model runs; empty without `attach`."""
    # Early exit, for drafts of assisted decoding, runs the first layers alone.
    layers = decoder_config(model).num_hidden_layers
    found: dict[int, LayerProjection] = {}
    for module in model.modules():
        projection = getattr(module, "matkv", None)
        if isinstance(projection, LayerProjection) and module.layer_idx < layers:
            found[int(module.layer_idx)] = projection  # type: ignore[arg-type]
    return found


def decoder_config(model: nn.Module) -> PreTrainedConfig:
    """The config of the decoder in a model, or in what wraps one.

    Raises:
        CacheError: it is no model of transformers.
    """
    parts = model.modules() if isinstance(model, nn.Module) else ()
    for part in parts:
        if isinstance(part, PreTrainedModel):
            return part.config.get_text_config(decoder=True)
    raise CacheError(f"a cache is made for a model of transformers, not for {str(model)[:40]!r}")


def _check_sliding(layer: DynamicSlidingWindowLayer, removed: int) -> None:
    length, window = layer.get_seq_length(), layer.sliding_window
    held = 0 if layer.keys is None else layer.keys.shape[-2]
    is_enough = layer.record_past and held - removed >= min(window - 1, length - removed)
    if length >= window and not is_enough:
        raise CacheError(
            f"cannot crop {removed} tokens of a cache with a sliding window of {window}: call "
            "activate_past_recording() before the tokens are added"
        )


def _layer_tensors(layer: Any) -> list[Tensor]:
    if hasattr(layer, "_tensors"):  # latents, static or not
        held: list[Tensor] = layer._tensors()
        return held
    return [t for t in (layer.keys, layer.values) if t is not None]


@torch.inference_mode()
def full_states(model: PreTrainedModel, tokens_T: Tensor) -> Cache:
    """The full keys and values of a detached model after reading `tokens_T`."""
    cache = new_cache(model)
    model.get_decoder()(
        tokens_T[None].to(model.device), **cache_argument(model, cache), use_cache=True
    )
    return cache
