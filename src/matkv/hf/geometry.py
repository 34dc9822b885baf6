"""What a model's cache looks like, and by what a model is recognized."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from matkv.errors import DataError, UnsupportedModelError
from matkv.ranks import Geometry, LayerShape


def geometry_of(config: PreTrainedConfig) -> Geometry:
    """The cache geometry of a model, from its config alone.

    Raises:
        UnsupportedModelError: its attention cannot be reproduced on latents.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; matkv compresses decoders")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(f"{name} has multi-head latent attention: already compressed")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{name} caps its attention scores (softcap)")
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise UnsupportedModelError(f"{name} does not state one number of attention heads")
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = []
    for layer in DynamicCache(config=text).layers:
        if type(layer) is DynamicLayer:
            layers.append(LayerShape(kv_heads=kv_heads, head_dim=head_dim))
        elif type(layer) is DynamicSlidingWindowLayer:
            window = int(layer.sliding_window)
            layers.append(LayerShape(kv_heads=kv_heads, head_dim=head_dim, window=window))
        else:
            raise UnsupportedModelError(f"{name} has cache layers of type {type(layer).__name__}")
    geometry = Geometry(query_heads=heads, layers=tuple(layers))
    if not geometry.growing:
        raise UnsupportedModelError(f"every layer of {name} has a sliding window: nothing grows")
    return geometry


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention module of every layer, in order.

    Raises:
        UnsupportedModelError: the model does not follow transformers' attention interface.
    """
    name = model.config.model_type
    found = {
        module.layer_idx: module
        for module in model.get_decoder().modules()
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


def output_projection(module: nn.Module) -> nn.Linear:
    """The linear map after a layer's attention.

    Raises:
        UnsupportedModelError: it has none of the usual names.
    """
    for name in ("o_proj", "dense", "out_proj"):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear):
            return projection
    raise UnsupportedModelError(
        f"{type(module).__name__} has no linear output projection named o_proj, dense or out_proj"
    )


def fingerprint(model: PreTrainedModel) -> tuple[float, ...]:
    """A few weights of every attention module, by which a model is recognized."""
    samples: list[float] = []
    for module in attention_modules(model):
        weight = next(p for p in module.parameters() if p.is_floating_point()).detach().flatten()
        picks = torch.linspace(0, weight.numel() - 1, 8).long().to(weight.device)
        samples += [round(sample, 7) for sample in weight[picks].float().tolist()]
    return tuple(samples)


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
