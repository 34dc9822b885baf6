"""The latent cache: transformers' cache interface over packed rows of latents.

Shapes: B batch, G KV head, N heads of one bucket, T token, D head dim, C row columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from matkv.cache.layer import LatentLayer
from matkv.cache.naming import cache_argument
from matkv.errors import CacheError
from matkv.latents.layer import LayerProjection


class LatentCache(Cache):
    """A cache of latents for an attached model, to generate with.

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
    # Assisted decoding with an early exit makes a cache for the first layers alone.
    within = {index: one for index, one in projections.items() if index < len(layers)}
    for index in within or projections:
        layer = layers[index] if index < len(layers) else None
        if type(layer) is not DynamicLayer or layer.is_initialized:
            raise CacheError(
                f"layer {index} of the {type(cache).__name__} cannot take latents: pass "
                "matkv.LatentCache(model), or none, to an attached model"
            )
    for index, projection in within.items():
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


@torch.inference_mode()
def full_states(model: PreTrainedModel, tokens_T: Tensor) -> Cache:
    """The full keys and values of a detached model after reading `tokens_T`."""
    cache = new_cache(model)
    model.get_decoder()(
        tokens_T[None].to(model.device), **cache_argument(model, cache), use_cache=True
    )
    return cache
