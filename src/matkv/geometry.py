"""The shape of a model's cache, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import Field

Size = Annotated[int, Field(strict=True, gt=0, le=2**31 - 1)]
Flag = Annotated[bool, Field(strict=True)]
# A shorter sliding window holds hardly more tokens than are kept exact: its layer stays as it is.
LEAST_WINDOW = 64


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer's cache: `kv_heads` × `head_dim` for keys and for values, a token.

    `window` is the layer's sliding window in tokens; None means that it keeps every token. With
    `ring`, a layer that has one is compressed as well.
    """

    kv_heads: Size
    head_dim: Size
    window: Size | None = None
    ring: Flag = False

    @property
    def is_compressed(self) -> bool:
        return self.window is None or self.ring

    def held(self, tokens: int) -> int:
        """Of how many of so many tokens the layer holds anything: as transformers has it."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    @property
    def columns(self) -> int:
        """Numbers of one token at full width, keys and values."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shape of a model's cache: `query_heads` of every layer, and each layer's `LayerShape`."""

    query_heads: Size
    layers: tuple[LayerShape, ...]

    @property
    def compressed(self) -> tuple[int, ...]:
        """Indices of the layers that matkv compresses."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.is_compressed)

    @property
    def staying(self) -> int:
        """How many layers have a sliding window, and stay at full width."""
        return len(self.layers) - len(self.compressed)

    @property
    def columns(self) -> int:
        """Numbers of one token at full width, of all compressed layers."""
        return sum(self.layers[index].columns for index in self.compressed)

    def without_rings(self) -> Geometry:
        """The same, layers with a sliding window left as they are: the shape of a model itself."""
        return replace(self, layers=tuple(replace(layer, ring=False) for layer in self.layers))

    def to_json(self) -> dict[str, Any]:
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            if not layer["ring"]:
                del layer["ring"]  # as before there were any
        return {"query_heads": self.query_heads, "layers": layers}


def default_step(head_dim: int) -> int:
    """Δ, the grain of ranks in a layer unless another is asked for: an eighth of the head dim."""
    return max(1, head_dim // 8)
