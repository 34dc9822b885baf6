"""The seam with transformers: switch a model's attention to latents and back.

A model hands post-rotary queries, keys and values of every layer to one registered attention
function. What that function does in a layer is decided by the layer's `matkv` attribute:

    LayerProjection     attend on latents, from the cache or made on the spot without one
    Projected           attend on keys and values multiplied by square matrices: training, search
    an Observer         look at queries, keys and values, then attend as usual
    nothing             attend as usual

Shapes: B batch, H query head, G KV head, Q query position, T cached token, D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from matkv.artifact import Artifact
from matkv.attention import Latents, attend
from matkv.cache import LatentCache, LatentLayer, use_latents
from matkv.errors import CacheError, MatkvError, RankError, UnsupportedModelError
from matkv.latents import LayerProjection, Projected
from matkv.ranks import Geometry, LayerShape, RankTable
from matkv.static_cache import StaticLatentLayer
from matkv.window import States, attend_near_exact

NAME = "matkv"
PREPARE = "_prepare_cache_for_generation"
logger = logging.getLogger(__name__)

# An observer sees one layer's [BHQD] queries and [BGTD] keys and values.
Observer = Callable[[Tensor, Tensor, Tensor], None]

# Keywords that models pass on to attention functions and that change nothing here: positions are in
# the rotary embedding, sliding windows and causality in the mask, the rest is for other functions.
HARMLESS = frozenset(
    {
        "cache_position",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


# ---- what a model's cache looks like


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


# ---- the attention function


def register() -> None:
    """Make "matkv" known to transformers as an attention implementation; may be called twice."""
    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name no mask would arrive, and padding would be attended.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Latents,
    value: Tensor | Latents,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.  [BHQD, BGTD, BGTD -> BQHD]

    Raises:
        UnsupportedModelError: a keyword asks for something this function does not do.
    """
    _refuse_unknown(module, kwargs)
    handler = getattr(module, "matkv", None)
    if isinstance(handler, LayerProjection):
        latents = key if isinstance(key, Latents) else _latents(handler, key, value)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out_BHQD = attend(latents, query, attention_mask, scaling=scaling, dropout=dropout)
        return out_BHQD.transpose(1, 2).contiguous(), None
    if isinstance(key, Latents) or isinstance(value, Latents):
        raise CacheError("the cache holds latents, but the model is not attached: use a new cache")
    exact = truncated = States(key, value)
    if isinstance(handler, Projected):
        truncated = States(*handler(key, value))
        if handler.window:
            out_BHQD = attend_near_exact(
                query,
                exact,
                truncated,
                attention_mask,
                window=handler.window,
                scaling=scaling,
                dropout=dropout,
            )
            return out_BHQD.transpose(1, 2).contiguous(), None
    elif handler is not None:
        handler(query, key, value)
    states = (query, truncated.key_BGTD, truncated.value_BGTD)
    return sdpa_attention_forward(module, *states, attention_mask, dropout=dropout, scaling=scaling)


def _latents(projection: LayerProjection, key: Tensor, value: Tensor | Latents) -> Latents:
    """Latents of a forward pass without a cache: those that a cache would hold after it."""
    assert isinstance(value, Tensor)
    if projection.keeps_exact:
        latents: Latents = LatentLayer(projection).update(key, value)[0]
        return latents
    return Latents(projection, projection.encode(key, value))


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("is_causal") is False:
        raise UnsupportedModelError("attention in both directions is not supported")
    for name, value in kwargs.items():
        if value is None or value is False or name in HARMLESS or name == "is_causal":
            continue
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {name}={str(value)[:40]!r} to its attention, which "
            "matkv would ignore: this model or option is not supported"
        )


# ---- attach and detach


@dataclass
class Attachment:
    """What `attach` did to a model, kept on it for `detach` and for questions about it."""

    artifact: Artifact
    table: RankTable
    attention_before: str
    hook: RemovableHandle
    weights_before: dict[str, Tensor]


def attach(
    model: PreTrainedModel,
    artifact: Artifact,
    budget: float | None = None,
    *,
    ranks: RankTable | None = None,
    sink: int | None = None,
    window: int | None = None,
) -> PreTrainedModel:
    """Switch `model` to latent attention at a budget or at given ranks; returns the same model.

    Afterwards `model.generate(...)` fills a `LatentCache` by itself. Attaching again replaces the
    ranks. `sink` and `window`, the numbers of first and last tokens kept exact, come from the
    artifact unless given.

    Raises:
        FingerprintError: the artifact was made for another model.
        BudgetError, RankError: the budget or the ranks do not fit.
    """
    if (budget is None) == (ranks is None):
        raise RankError("attach takes either a budget or a rank table")
    modules = attention_modules(model)
    if _merged(model):  # with its own weights again, it can be recognized
        detach(model)
    artifact.check(geometry_of(model.config), fingerprint(model))
    table = ranks if ranks is not None else artifact.table(budget)  # type: ignore[arg-type]
    if table.geometry != artifact.geometry:
        raise RankError("the rank table was made for another model's geometry")
    sink, window = _exact(artifact.sink, sink, "sink"), _exact(artifact.window, window, "window")
    detach(model)
    for layer in artifact.geometry.growing:
        projection = LayerProjection(
            artifact.maps(layer, "key"),
            artifact.maps(layer, "value"),
            table.key[layer],
            table.value[layer],
            sink=sink,
            window=window,
        )
        parameter = next(modules[layer].parameters())
        modules[layer].matkv = projection.to(parameter.device, model.dtype).requires_grad_(False)
    before = _use_implementation(model, NAME)
    prepare = partial(_prepare_forward, notes_padding=sink > 0)
    hook = model.get_decoder().register_forward_pre_hook(prepare, with_kwargs=True)
    model.__dict__[PREPARE] = MethodType(_prepare_cache_for_generation, model)
    model.__dict__["matkv_attachment"] = Attachment(
        artifact, table, before, hook, _merge(model, artifact)
    )
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; does nothing to a model that is not attached. Returns the same model."""
    attachment: Attachment | None = model.__dict__.pop("matkv_attachment", None)
    if attachment is None:
        return model
    attachment.hook.remove()
    del model.__dict__[PREPARE]
    for name, weight in attachment.weights_before.items():
        model.get_parameter(name).data.copy_(weight)
    for module in attention_modules(model):
        if isinstance(getattr(module, "matkv", None), LayerProjection):
            del module.matkv
    model.set_attn_implementation(attachment.attention_before)
    return model


def _merged(model: PreTrainedModel) -> bool:
    attachment: Attachment | None = model.__dict__.get("matkv_attachment")
    return attachment is not None and bool(attachment.weights_before)


@torch.no_grad()
def _merge(model: PreTrainedModel, artifact: Artifact) -> dict[str, Tensor]:
    """Add the artifact's adapters to the weights; returns copies, on the CPU, of those before.

    Copies, because subtracting again would not give the same weights back.
    """
    before: dict[str, Tensor] = {}
    for path, update in artifact.lora.updates() if artifact.lora is not None else ():
        weight = model.get_parameter(f"{path}.weight")
        before[f"{path}.weight"] = weight.detach().to("cpu", copy=True)
        weight.add_(update.to(weight.device, weight.dtype))
    return before


def attached_table(model: PreTrainedModel) -> RankTable:
    """The ranks an attached model runs at.

    Raises:
        MatkvError: the model is not attached.
    """
    attachment: Attachment | None = model.__dict__.get("matkv_attachment")
    if attachment is None:
        raise MatkvError("the model is not attached: call matkv.attach(model, artifact, budget)")
    return attachment.table


@contextmanager
def handled(model: PreTrainedModel, handlers: Mapping[int, Projected | Observer]) -> Iterator[None]:
    """Let `handlers[layer]` take part in the attention of forward passes meanwhile.

    Raises:
        MatkvError: the model is attached.
    """
    if "matkv_attachment" in model.__dict__:
        raise MatkvError("the model is attached: call matkv.detach(model) first")
    modules = attention_modules(model)
    before = _use_implementation(model, NAME)
    try:
        for layer, handler in handlers.items():
            modules[layer].__dict__["matkv"] = handler  # not a submodule: the model stays as it is
        yield
    finally:
        for layer in handlers:
            modules[layer].__dict__.pop("matkv", None)
        model.set_attn_implementation(before)


def _use_implementation(model: PreTrainedModel, name: str) -> str:
    register()
    text = model.config.get_text_config(decoder=True)
    before: str = text._attn_implementation
    model.set_attn_implementation(name)
    return before


def _exact(default: int, given: int | None, name: str) -> int:
    tokens = default if given is None else given
    if tokens < 0:
        raise RankError(f"{name} {tokens} must be a number of tokens, 0 for none")
    return tokens


def _prepare_forward(
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


def _prepare_cache_for_generation(
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
