"""kvpress: one press that drops key channels (ThinK) and three that drop tokens.

A press compresses the context right after it was read; the tokens after it stay exact. ThinK zeroes
channels, so its cache is as large as before: counted are the bytes its paper (arXiv 2407.21018)
stores, the kept channels of the context's keys and one bit a channel to say which; the note and
`resident_bytes_per_token` say what is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .protocol import Contestant, Method, full_bytes_per_token

EVICTION = {
    "SnapKV": "SnapKVPress",
    "expected attention": "ExpectedAttentionPress",
    "StreamingLLM": "StreamingLLMPress",
}
DROPPED_TOKENS = (0.25, 0.5, 0.625, 0.75, 0.875)
DROPPED_CHANNELS = (0.25, 0.5, 0.75)


class Press(Method):
    """A press of kvpress by name, with its options."""

    packages = ("kvpress",)

    def __init__(self, name: str, options: dict[str, float]) -> None:
        import kvpress

        self.press: Any = getattr(kvpress, name)(**options)

    def read(self, model: Any, context_BT: Tensor) -> Any:
        with self.press(model):
            return super().read(model, context_BT)


class ThinK(Press):
    """ThinK's press, counted as its paper stores keys."""

    note = "simulated by the package: dropped channels are zeros, nothing is freed"

    def __init__(self, dropped: float) -> None:
        super().__init__("ThinKPress", {"key_channel_compression_ratio": dropped})
        self.dropped, self.saved = dropped, 0.0

    def read(self, model: Any, context_BT: Tensor) -> Any:
        layers, full = model.config.num_hidden_layers, full_bytes_per_token(model)
        channels = full // (2 * layers * model.dtype.itemsize)  # of one layer's keys
        head_dim = channels // model.config.num_key_value_heads
        gone = int(head_dim * self.dropped) / head_dim
        self.saved = context_BT.shape[1] * full / 2 * gone - layers * channels / 8
        return super().read(model, context_BT)

    def held(self, cache: Any) -> tuple[float, float | None]:
        resident = super().held(cache)[0]
        return resident - self.saved, resident


def contestants(
    dropped_tokens: Sequence[float] = DROPPED_TOKENS, eviction: Sequence[str] = tuple(EVICTION)
) -> list[Contestant]:
    """ThinK, and the presses of `eviction` at these shares of the context."""
    thinned = [
        Contestant(
            method="ThinK (kvpress)",
            setting=f"{dropped:.0%} of key channels dropped",
            family="channel pruning",
            build=partial(ThinK, dropped),
        )
        for dropped in DROPPED_CHANNELS
    ]
    return thinned + [
        Contestant(
            method=f"{method} (kvpress)",
            setting=f"{dropped:.1%} of the context dropped",
            family="eviction",
            build=partial(Press, press, {"compression_ratio": dropped}),
        )
        for method, press in EVICTION.items()
        if method in eviction
        for dropped in dropped_tokens
    ]
