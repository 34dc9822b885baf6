"""Sharing the layers below a change: run a model's blocks once, and again only from one on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from matkv.errors import UnsupportedModelError


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks, in order.

    Raises:
        UnsupportedModelError: there is no list of them.
    """
    decoder = model.get_decoder()
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == layers:
            return list(child)
    raise UnsupportedModelError(f"{type(decoder).__name__} has no list of {layers} decoder blocks")


@contextmanager
def recorded(blocks: list[nn.Module]) -> Iterator[list[Any]]:
    """Collect what every block returns."""
    outputs: list[Any] = []
    hooks = [block.register_forward_hook(lambda *io: outputs.append(io[2])) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def resumed(blocks: list[nn.Module], outputs: list[Any], layer: int, copies: int) -> Iterator[None]:
    """Let blocks below `layer` return what they returned before, once per copy of the batch."""
    replaced = blocks[:layer]
    try:
        for block, output in zip(replaced, outputs, strict=False):
            block.forward = _Replay(output, copies)
        yield
    finally:
        for block in replaced:
            del block.forward


class _Replay:
    """Stands in for a block's forward."""

    def __init__(self, output: Any, copies: int) -> None:
        self.output, self.copies = output, copies

    def __call__(self, *_: Any, **__: Any) -> Any:
        if isinstance(self.output, Tensor):
            return self._copied(self.output)
        return tuple(self._copied(part) for part in self.output)

    def _copied(self, part: Any) -> Any:
        if not isinstance(part, Tensor) or self.copies == 1:
            return part
        return part.repeat(self.copies, *[1] * (part.dim() - 1))
