"""What a model's cache looks like, and where its attention is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from matkv.errors import DataError, UnsupportedModelError
from matkv.hf.wrappers import decoder_of, model_in
from matkv.ranks import LEAST_WINDOW, Geometry, LayerShape


def geometry_of(config: PreTrainedConfig, *, windows: bool = True) -> Geometry:
    """The cache geometry of a model, from its config alone.

    With `windows`, layers with a sliding window that is long enough are compressed as well.

    Raises:
        UnsupportedModelError: its attention cannot be reproduced on latents.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; matkv compresses decoders")
    text = config.get_text_config(decoder=True)
    caches = _cache_layers(text)
    own = _layer_configs(text, len(caches))
    if any(getattr(one, "kv_lora_rank", None) is not None for one in own):
        raise UnsupportedModelError(f"{name} has multi-head latent attention: already compressed")
    if any(getattr(one, "attn_logit_softcapping", None) is not None for one in own):
        raise UnsupportedModelError(f"{name} caps its attention scores (softcap)")
    heads = {getattr(one, "num_attention_heads", None) for one in own}
    query_heads = heads.pop() if len(heads) == 1 else None
    if not isinstance(query_heads, int):
        raise UnsupportedModelError(f"{name} does not state one number of attention heads")
    layers = [_layer_shape(name, one, layer) for one, layer in zip(own, caches, strict=True)]
    geometry = Geometry(query_heads=query_heads, layers=tuple(layers))
    if not geometry.without_rings().compressed:
        raise UnsupportedModelError(f"every layer of {name} has a sliding window: nothing grows")
    return geometry if windows else geometry.without_rings()


def _cache_layers(text: PreTrainedConfig) -> list[Any]:
    """The layers of the cache that transformers makes by a config."""
    try:
        return DynamicCache(config=text).layers
    except (KeyError, AttributeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"transformers makes no cache for {text.model_type} that grows in every layer "
            f"({type(error).__name__}: {_one_line(error)})"
        ) from error


def _layer_configs(text: PreTrainedConfig, count: int) -> list[PreTrainedConfig]:
    """Each layer's own config: a model may have layers that differ."""
    view = getattr(text, "per_layer_config", None)
    return [text] * count if view is None else [view[layer] for layer in range(count)]


def _layer_shape(name: str, config: PreTrainedConfig, layer: Any) -> LayerShape:
    query_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    if type(layer) is DynamicLayer:
        return LayerShape(kv_heads=kv_heads, head_dim=head_dim)
    if type(layer) is DynamicSlidingWindowLayer:
        window = int(layer.sliding_window)
        ring = window >= LEAST_WINDOW
        return LayerShape(kv_heads=kv_heads, head_dim=head_dim, window=window, ring=ring)
    raise UnsupportedModelError(f"{name} has cache layers of type {type(layer).__name__}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention module of every layer, in order.

    Raises:
        UnsupportedModelError: the model does not follow transformers' attention interface.
    """
    model = model_in(model)
    name = model.config.model_type
    found = {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in decoder_of(model).modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
    }
    layers = len(geometry_of(model.config).layers)
    if not model._supports_attention_backend or sorted(found) != list(range(layers)):
        raise UnsupportedModelError(f"{name} does not follow transformers' attention interface")
    for module in found.values():
        if isinstance(getattr(module, "sinks", None), Tensor):
            raise UnsupportedModelError(f"{name} has learned attention sinks")
        if not module.is_causal:
            raise UnsupportedModelError(f"{name} attends in both directions")
    return [found[index] for index in range(layers)]


def check_positions(model: PreTrainedModel, tokens: int, extra: int) -> None:
    """Make sure that a model has positions for so many tokens and `extra` more.

    Raises:
        DataError: it has not.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens + extra > limit:
        answer = f" and an answer of {extra}" if extra else ""
        raise DataError(
            f"a context of {tokens} tokens{answer} needs {tokens + extra} positions, the model has "
            f"{limit}: give a shorter one"
        )
