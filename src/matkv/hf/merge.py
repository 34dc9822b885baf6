"""Adapters added to a model's weights, and taken out again to the bit.

Shapes: M output dim, X input dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from matkv.artifact.lora import Lora
from matkv.errors import UnsupportedModelError
from matkv.hf.weights import is_plain
from matkv.hf.wrappers import model_in


class Merged:
    """An adapter in one linear map's weight.

    The weight before is copied, to the CPU, because subtracting again would not give it back. What
    is saved of the model meanwhile is that one: adapters are the artifact's, not the model's.
    """

    @torch.no_grad()
    def __init__(self, linear: nn.Linear, update_MX: Tensor) -> None:
        weight_MX = linear.weight
        self.linear = linear
        self.before_MX = weight_MX.detach().to("cpu", copy=True)
        weight_MX.add_(update_MX.to(weight_MX.device, weight_MX.dtype))
        self.hook = linear.register_state_dict_post_hook(self)

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, about: Any) -> None:
        """What `state_dict()` calls after it has gathered the weights of the map."""
        state[f"{prefix}weight"] = self.before_MX.to(self.linear.weight)

    @torch.no_grad()
    def undo(self) -> None:
        """Give the weight back; may be called twice."""
        self.linear.weight.copy_(self.before_MX)
        self.hook.remove()


def merge(model: nn.Module, lora: Lora | None) -> list[Merged]:
    """Add adapters to the weights of a model, until each is undone.

    Raises:
        UnsupportedModelError: the model has no such linear maps, or their weights are packed.
    """
    updates = list(lora.updates()) if lora is not None else []
    linears = [_linear(model, path) for path, _ in updates]
    return [
        Merged(linear, update_MX) for linear, (_, update_MX) in zip(linears, updates, strict=True)
    ]


@contextmanager
def merged(model: nn.Module, lora: Lora | None) -> Iterator[None]:
    """Let adapters be in the weights of a model meanwhile; see `merge`."""
    parts = merge(model, lora)
    try:
        yield
    finally:
        for part in parts:
            part.undo()


def _linear(model: nn.Module, path: str) -> nn.Linear:
    """The linear map that adapters know as `path`, inside peft's own wrapper too."""
    outer = model_in(model)
    found: nn.Module = outer
    # Paths are those of the model with its head; a decoder alone is that model's body.
    for step in path.split("."):
        part = getattr(found, step, None)
        if part is None and found is outer and step == outer.base_model_prefix:
            continue
        if not isinstance(part, nn.Module):
            raise UnsupportedModelError(f"the model has no {path}, which has an adapter")
        found = part
    while isinstance(inside := getattr(found, "base_layer", None), nn.Module):
        found = inside
    if not is_plain(found):
        raise UnsupportedModelError(
            f"the weights of {path} are packed or offloaded, so that the artifact's adapters "
            "cannot be added: load the model in bfloat16 or float32 on one device"
        )
    assert isinstance(found, nn.Linear)
    return found
