"""The hooks by which a model fills a cache of latents by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from matkv.cache.cache import LatentCache, use_latents
from matkv.cache.layer import LatentLayer, note_padding
from matkv.cache.static import StaticLatentLayer

PREPARE = "_prepare_cache_for_generation"


def prepare_forward(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A pre-hook that turns the empty cache of a forward pass into a latent one, in place.

    In place, because the caller keeps its own reference to the cache.
    """
    assert isinstance(decoder, PreTrainedModel)
    cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    wanted = decoder.config.get_text_config().use_cache if use_cache is None else use_cache
    if cache is None and wanted:
        cache = kwargs["past_key_values"] = LatentCache(decoder)
    elif cache is not None and not _is_latent(cache):
        use_latents(cache, decoder)
    if cache is not None:
        inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        tokens_BT = next(x for x in inputs if isinstance(x, Tensor))
        note_padding(cache.layers, kwargs.get("attention_mask"), *tokens_BT.shape[:2])
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
