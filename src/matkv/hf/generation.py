"""The hooks by which a model fills a cache of latents by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from matkv.cache.cache import LatentCache, use_latents
from matkv.cache.layer import LatentLayer
from matkv.cache.static import StaticLatentLayer
from matkv.latents.layer import LayerProjection

PREPARE = "_prepare_cache_for_generation"


def prepare_forward(
    decoder: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    notes_padding: bool,
) -> tuple[Any, dict[str, Any]]:
    """A pre-hook that turns the empty cache of a forward pass into a latent one, in place.

    In place, because the caller keeps its own reference to the cache.
    """
    assert isinstance(decoder, PreTrainedModel)
    cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    wanted = decoder.config.get_text_config().use_cache if use_cache is None else use_cache
    if cache is None and wanted:
        kwargs["past_key_values"] = LatentCache(decoder)
    elif cache is not None and not _is_latent(cache):
        use_latents(cache, decoder)
    if notes_padding:
        _note_padding(decoder, kwargs.get("attention_mask"))
    return args, kwargs


def prepare_cache_for_generation(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *args: Any,
) -> None:
    """What `generate` calls on an attached model to make its cache.

    The cache turns latent at once, because assisted decoding asks it to record its past before the
    first forward pass.
    """
    getattr(type(model), PREPARE)(model, generation_config, model_kwargs, *args)
    cache = model_kwargs.get("past_key_values")
    if cache is not None and not _is_latent(cache):
        use_latents(cache, model)
        if generation_config.is_assistant:
            cache.activate_past_recording()


def _is_latent(cache: Any) -> bool:
    kinds = LatentLayer, StaticLatentLayer
    return any(isinstance(layer, kinds) for layer in getattr(cache, "layers", ()))


def _note_padding(model: PreTrainedModel, mask: Any) -> None:
    """Tell layers that keep sinks where each sequence starts, counted with left padding.

    A sequence of padding alone, as the first of several chunks can be, starts after it. Without
    padding, nothing is noted.
    """
    start_B = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all()):
        real_BT = mask.bool()
        start_B = torch.where(real_BT.any(-1), real_BT.int().argmax(-1), real_BT.shape[1])
    for module in model.modules():
        if isinstance(module, LayerProjection) and module.sink:
            module.start_B = start_B
