"""The seam with transformers: the attention function that decides for every layer.

A model hands post-rotary queries, keys and values of every layer to one registered attention
function. What that function does in a layer is up to the layer's handler, its attribute `matkv`;
without one, the layer attends as usual. The handlers there are, are in handlers.py.

Shapes: B batch, H query head, G KV head, Q query position, T cached token, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from matkv.errors import CacheError, MatkvError, UnsupportedModelError
from matkv.hf.geometry import attention_modules
from matkv.hf.wrappers import decoder_of, model_in
from matkv.latents.latents import Latents

NAME = "matkv"  # of the attention implementation, and of the attribute that holds a handler
ATTACHMENT = "matkv_attachment"  # the attribute of a decoder that says how it is attached
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


@dataclass(frozen=True)
class Call:
    """One layer's attention as the model asks for it; the cache may put latents for the states."""

    module: nn.Module
    query_BHQD: Tensor
    key_BGTD: Tensor | Latents
    value_BGTD: Tensor | Latents
    mask: Tensor | None
    scaling: float | None
    dropout: float

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values at full width.

        Raises:
            CacheError: the cache holds latents.
        """
        key, value = self.key_BGTD, self.value_BGTD
        if isinstance(key, Latents) or isinstance(value, Latents):
            raise CacheError(
                "the cache holds latents, but the model is not attached: use a new cache"
            )
        return key, value

    def usual(self, key_BGTD: Tensor, value_BGTD: Tensor) -> Tensor:
        """Attention on these keys and values as if matkv were not there.  [-> BQHD]"""
        states = self.query_BHQD, key_BGTD, value_BGTD
        out_BQHD: Tensor = sdpa_attention_forward(
            self.module, *states, self.mask, dropout=self.dropout, scaling=self.scaling
        )[0]
        return out_BQHD


class Handler(Protocol):
    """What attends in a layer in place of the usual function."""

    def attend(self, call: Call) -> Tensor:
        """The output of the layer's attention.  [-> BQHD]"""


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
    call = Call(module, query, key, value, attention_mask, scaling, dropout)
    handler: Handler | None = getattr(module, NAME, None)
    out_BQHD = call.usual(*call.states) if handler is None else handler.attend(call)
    return out_BQHD, None


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
def handled(model: nn.Module, handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Let `handlers[layer]` attend in forward passes meanwhile.

    Raises:
        MatkvError: the model is attached.
    """
    model = model_in(model)
    decoder = decoder_of(model)
    if ATTACHMENT in decoder.__dict__:
        raise MatkvError("the model is attached: call matkv.detach(model) first")
    modules = attention_modules(model)
    before = use_handlers(decoder)
    try:
        for layer, handler in handlers.items():
            modules[layer].__dict__[NAME] = handler  # not a submodule: the model stays as it is
        yield
    finally:
        for layer in handlers:
            modules[layer].__dict__.pop(NAME, None)
        use_implementations(decoder, before)


def use_handlers(decoder: PreTrainedModel) -> dict[str, str]:
    """Let handlers attend in a decoder, as far as there are any.

    Returns the implementation before, of every model in it that has a config of its own.
    """
    register()
    before = {
        name: str(part.config._attn_implementation)
        for name, part in decoder.named_modules()
        if isinstance(part, PreTrainedModel)
    }
    decoder.set_attn_implementation(NAME)
    return before


def use_implementations(decoder: PreTrainedModel, implementations: Mapping[str, str]) -> None:
    """Undo `use_handlers`: give each part its own implementation again."""
    for name, implementation in implementations.items():
        part = decoder.get_submodule(name)
        assert isinstance(part, PreTrainedModel)
        part.config._attn_implementation = implementation
