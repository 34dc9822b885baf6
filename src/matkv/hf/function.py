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
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from matkv.attention.latent import attend
from matkv.attention.truncated import States, attend_near_exact
from matkv.bases.gates import Projected
from matkv.cache.layer import LatentLayer, note_padding
from matkv.errors import CacheError, MatkvError, UnsupportedModelError
from matkv.hf.geometry import attention_modules
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection

NAME = "matkv"
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
        latents = key if isinstance(key, Latents) else _latents(handler, key, value, attention_mask)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out_BHQD = attend(latents, query, attention_mask, scaling=scaling, dropout=dropout)
        return out_BHQD.transpose(1, 2).contiguous(), None
    if isinstance(key, Latents) or isinstance(value, Latents):
        raise CacheError("the cache holds latents, but the model is not attached: use a new cache")
    exact = truncated = States(key, value)
    if isinstance(handler, Projected):
        truncated = States(*handler(key, value))
        if handler.recent:
            out_BHQD = attend_near_exact(
                query,
                exact,
                truncated,
                attention_mask,
                recent=handler.recent,
                scaling=scaling,
                dropout=dropout,
            )
            return out_BHQD.transpose(1, 2).contiguous(), None
    elif handler is not None:
        handler(query, key, value)
    states = (query, truncated.key_BGTD, truncated.value_BGTD)
    return sdpa_attention_forward(module, *states, attention_mask, dropout=dropout, scaling=scaling)


def _latents(
    projection: LayerProjection, key: Tensor, value: Tensor | Latents, mask: Tensor | None
) -> Latents:
    """Latents of a forward pass without a cache: those that a cache would hold after it."""
    assert isinstance(value, Tensor)
    if projection.keeps_exact:
        layer = LatentLayer(projection)
        note_padding([layer], mask, len(key), key.shape[2])
        latents: Latents = layer.update(key, value)[0]
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


@contextmanager
def handled(model: PreTrainedModel, handlers: Mapping[int, Projected | Observer]) -> Iterator[None]:
    """Let `handlers[layer]` take part in the attention of forward passes meanwhile.

    Raises:
        MatkvError: the model is attached.
    """
    if "matkv_attachment" in model.__dict__:
        raise MatkvError("the model is attached: call matkv.detach(model) first")
    modules = attention_modules(model)
    before = use_implementation(model, NAME)
    try:
        for layer, handler in handlers.items():
            modules[layer].__dict__["matkv"] = handler  # not a submodule: the model stays as it is
        yield
    finally:
        for layer in handlers:
            modules[layer].__dict__.pop("matkv", None)
        model.set_attn_implementation(before)


def use_implementation(model: PreTrainedModel, name: str) -> str:
    """Switch to an attention implementation; returns the one before."""
    register()
    text = model.config.get_text_config(decoder=True)
    before: str = text._attn_implementation
    model.set_attn_implementation(name)
    return before
