"""What attends in a layer in place of the usual function: latents, truncated states, an observer.

Shapes: B batch, H query head, G KV head, Q query position, T cached token, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from matkv.attention.latent import attend
from matkv.attention.masks import seen_slots
from matkv.attention.truncated import States, attend_near_exact
from matkv.bases.gates import Projected
from matkv.cache.layer import LatentLayer, note_padding
from matkv.errors import CacheError
from matkv.hf.function import Call, handled, register
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection

# An observer sees one layer's [BHQD] queries and [BGTD] keys and values.
Observer = Callable[[Tensor, Tensor, Tensor], None]


class OnLatents(LayerProjection):
    """Attends on latents: those of the cache, or without one those made on the spot."""

    def attend(self, call: Call) -> Tensor:
        """[-> BQHD]

        Raises:
            CacheError: the cache holds full keys and values.
        """
        latents = call.key_BGTD if isinstance(call.key_BGTD, Latents) else self._latents(call)
        scaling = call.query_BHQD.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        out_BHQD = attend(
            latents, call.query_BHQD, call.mask, scaling=scaling, dropout=call.dropout
        )
        if self.coder is not None and out_BHQD.requires_grad:
            out_BHQD.register_hook(_refuse_gradient)
        return out_BHQD.transpose(1, 2).contiguous()

    def _latents(self, call: Call) -> Latents:
        """Latents of a forward pass without a cache: those that a cache would hold after it."""
        key_BGTD, value_BGTD = call.states
        if key_BGTD.shape[2] != call.query_BHQD.shape[2]:
            raise CacheError(
                "the cache of an attached model holds full keys and values: pass "
                "matkv.LatentCache(model), or none"
            )
        if self.keeps_exact:
            layer = LatentLayer(self)
            note_padding([layer], seen_slots(call.mask), len(key_BGTD), key_BGTD.shape[2])
            latents: Latents = layer.update(key_BGTD, value_BGTD)[0]
            return latents
        return Latents(self, self.encode(key_BGTD, value_BGTD))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model unpickled in a new process asks for its attention implementation by name."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register()


def _refuse_gradient(gradient_BHQD: Tensor) -> None:
    """Raises:
    CacheError: always, for keys and values would get no gradient.
    """
    raise CacheError(
        "codes in a cache pass no gradient on: train with matkv.distill, or attach at ranks"
    )


@dataclass(frozen=True)
class OnTruncated:
    """Attends on keys and values multiplied by square matrices: training and search."""

    projected: Projected

    def attend(self, call: Call) -> Tensor:
        """[-> BQHD]"""
        return _attend(call, self.projected, self.projected(*call.states))


def _attend(call: Call, projected: Projected, truncated: tuple[Tensor, Tensor]) -> Tensor:
    """Attention on truncated states, those of recent tokens exact.  [-> BQHD]"""
    if not projected.recent:
        return call.usual(*truncated)
    out_BHQD = attend_near_exact(
        call.query_BHQD,
        States(*call.states),
        States(*truncated),
        call.mask,
        recent=projected.recent,
        scaling=call.scaling,
        dropout=call.dropout,
    )
    return out_BHQD.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Observed:
    """Shows an observer what passes, and attends as usual."""

    observer: Observer

    def attend(self, call: Call) -> Tensor:
        """[-> BQHD]"""
        key_BGTD, value_BGTD = call.states
        self.observer(call.query_BHQD, key_BGTD, value_BGTD)
        return call.usual(key_BGTD, value_BGTD)


class Watches(Protocol):
    """Sees one side's states, and the gradients by them."""

    def see(self, x_BGTD: Tensor) -> None: ...

    def add(self, grad_BGTD: Tensor) -> None: ...


@dataclass(frozen=True)
class Traced:
    """Shows keys and values to two watchers, and later the gradients by what stands for them.

    Queries near a token see it exact, and their gradients do not count: no code is in their way.
    """

    key: Watches
    value: Watches
    projected: Projected

    def attend(self, call: Call) -> Tensor:
        """[-> BQHD]"""
        exact = call.states
        for watcher, x_BGTD in zip((self.key, self.value), exact, strict=True):
            watcher.see(x_BGTD.detach())
        key, value = (
            _watched(watcher, x_BGTD)
            for watcher, x_BGTD in zip((self.key, self.value), self.projected(*exact), strict=True)
        )
        return _attend(call, self.projected, (key, value))


def _watched(watcher: Watches, x_BGTD: Tensor) -> Tensor:
    """The same states, whose gradients `watcher` will see."""
    # Nothing below the first traced layer has gradients, for the weights have none.
    is_reached = x_BGTD.requires_grad
    x_BGTD = x_BGTD.view_as(x_BGTD) if is_reached else x_BGTD.detach().clone().requires_grad_()
    x_BGTD.register_hook(watcher.add)
    return x_BGTD


def tracing(model: nn.Module, handlers: Mapping[int, Traced]) -> AbstractContextManager[None]:
    """Let watchers see what passes through layers meanwhile.

    Raises:
        MatkvError: the model is attached.
    """
    return handled(model, handlers)


def truncating(
    model: nn.Module, projected: Mapping[int, Projected]
) -> AbstractContextManager[None]:
    """Let layers attend on keys and values as `projected[layer]` changes them, meanwhile.

    Raises:
        MatkvError: the model is attached.
    """
    return handled(model, {layer: OnTruncated(one) for layer, one in projected.items()})
