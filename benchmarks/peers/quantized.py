"""transformers' QuantizedCache: integer codes by quanto or hqq, or 8-bit floats.

The last tokens, 128 at most, stay exact until the next flush quantizes everything held anew; the
8-bit floats have one scale a layer and side, frozen after the context. Axes are the ones that the
documentation recommends: groups of 64 neighbours within one token and head. `by channel` groups the
keys of 64 tokens by channel instead, as KIVI does (arXiv 2402.02750).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .protocol import Contestant, Method, tensor_nbytes

PACKAGES = {"quanto": ("optimum-quanto",), "hqq": ("hqq",), "fp8": ()}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp8": {"backend": "fp8"},
    **{
        f"quanto {bits} bit": {"backend": "quanto", "nbits": bits, "axis_key": 0, "axis_value": 0}
        for bits in (8, 4, 2)
    },
    **{
        f"quanto {bits} bit, keys by channel": {
            "backend": "quanto",
            "nbits": bits,
            "axis_key": -1,
            "axis_value": 0,
        }
        for bits in (4, 2)
    },
    **{
        f"hqq {bits} bit": {"backend": "hqq", "nbits": bits, "axis_key": 1, "axis_value": 1}
        for bits in (8, 4, 2)
    },
}


class Quantized(Method):
    """A QuantizedCache with given options."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.packages = PACKAGES[options["backend"]]

    def new_cache(self, model: Any) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache(config=model.config, **self.options)

    def held(self, cache: Any) -> tuple[float, float | None]:
        nbytes = tensor_nbytes(
            [
                (layer.keys, layer.values, layer._quantized_keys, layer._quantized_values)
                for layer in cache.layers
            ]
        )
        return nbytes, nbytes


def contestants() -> list[Contestant]:
    return [
        Contestant(
            method="QuantizedCache",
            setting=setting,
            family="quantization",
            build=partial(Quantized, options),
        )
        for setting, options in SETTINGS.items()
    ]
