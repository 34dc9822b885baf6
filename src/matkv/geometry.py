"""The shape of a model's cache, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

Size = Annotated[int, Field(strict=True, gt=0, le=2**31 - 1)]


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer's cache: `kv_heads` × `head_dim` for keys and for values, a token.

    `window` is the layer's sliding window in tokens; None means that it keeps every token.
    """

    kv_heads: Size
    head_dim: Size
    window: Size | None = None

    @property
    def grows(self) -> bool:
        return self.window is None

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
    def growing(self) -> tuple[int, ...]:
        """Indices of the layers that keep every token: the ones matkv compresses."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.grows)

    @property
    def staying(self) -> int:
        """How many layers have a sliding window, and stay at full width."""
        return len(self.layers) - len(self.growing)

    @property
    def columns(self) -> int:
        """Numbers of one token at full width, of all layers that grow."""
        return sum(self.layers[index].columns for index in self.growing)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def default_step(head_dim: int) -> int:
    """Δ, the grain of ranks in a layer unless another is asked for: an eighth of the head dim."""
    return max(1, head_dim // 8)
