"""The hooks by which a model fills a cache of latents by itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from matkv.attention.masks import seen_slots
from matkv.cache.cache import LatentCache, attached_projections, use_latents
from matkv.cache.layer import HoldsLatents, note_padding
from matkv.cache.naming import NAMES, cache_name
from matkv.errors import CacheError, UnsupportedModelError

PREPARE = "_prepare_cache_for_generation"


class PrepareForward:
    """A pre-hook of a decoder: the empty cache of a forward pass turns latent, in place.

    In place, because the caller keeps its own reference to the cache. Arguments by position are
    turned into keywords on the way.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        self.cache_name = cache_name(type(decoder).forward)
        parameters = inspect.signature(type(decoder).forward).parameters.values()
        named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.names = tuple(named[1:])  # without self

    def __call__(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Raises:
        CacheError: the cache cannot take latents.
        UnsupportedModelError: attention weights are asked for, which latents do not give.
        """
        assert isinstance(decoder, PreTrainedModel)
        named = dict(zip(self.names, args, strict=False))
        if len(args) > len(named) or named.keys() & kwargs.keys():
            return args, kwargs  # Python refuses the call
        kwargs = named | kwargs
        config = decoder.config.get_text_config()
        if kwargs.get("output_attentions", config.output_attentions):
            raise UnsupportedModelError(
                "output_attentions=True: attention on latents gives no attention weights; "
                "call matkv.detach(model) first"
            )
        cache = next((x for x in kwargs.values() if isinstance(x, Cache)), None)
        use_cache = kwargs.get("use_cache")
        if cache is not None:
            use_latents(cache, decoder)
        elif (config.use_cache if use_cache is None else use_cache) and not _checkpoints(decoder):
            for name in NAMES:
                kwargs.pop(name, None)
            cache = kwargs[self.cache_name] = LatentCache(decoder)
        if cache is not None:
            inputs = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
            tokens_BT = next(x for x in inputs if isinstance(x, Tensor))
            seen_BT = seen_slots(kwargs.get("attention_mask"))
            note_padding(cache.layers, seen_BT, *tokens_BT.shape[:2])
        return (), kwargs


def _checkpoints(decoder: nn.Module) -> bool:
    """Whether gradient checkpointing will leave any cache empty."""
    return decoder.training and bool(getattr(decoder, "gradient_checkpointing", False))


def check_caches(decoder: nn.Module, args: Any, output: Any) -> None:
    """A hook of an attached decoder: what it filled, under whatever name, holds latents.

    Raises:
        CacheError: a cache holds full keys and values.
    """
    values: Iterable[Any] = output.values() if isinstance(output, dict) else output
    for cache in values if isinstance(values, Iterable) else ():
        if isinstance(cache, Cache) and not is_latent(cache) and attached_projections(decoder):
            raise CacheError(
                f"the attached model filled a {type(cache).__name__} without latents: pass "
                "matkv.LatentCache(model), or call matkv.detach(model)"
            )


@dataclass(frozen=True, eq=False)
class PrepareGeneration:
    """What `generate` calls on an attached model to make its cache.

    The cache turns latent at once, because assisted decoding asks it to record its past before the
    first forward pass.
    """

    model: PreTrainedModel

    def __call__(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        getattr(type(self.model), PREPARE)(self.model, generation_config, model_kwargs, *args)
        for name in NAMES:
            cache = model_kwargs.get(name)
            if isinstance(cache, Cache) and not is_latent(cache):
                use_latents(cache, self.model)
                if generation_config.is_assistant:
                    cache.activate_past_recording()


def is_latent(cache: Any) -> bool:
    """Whether a cache holds latents in the layers that grow."""
    return any(isinstance(layer, HoldsLatents) for layer in getattr(cache, "layers", ()))
