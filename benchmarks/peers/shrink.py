"""cacheshrink: attention converted to cached latents before rotary embedding, not trained further.

Its own calibration on the training texts, its own choice of method (`auto`: latents with bases
shared by neighbouring layers for grouped heads, per layer otherwise) and, as a second setting, the
per-layer method for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .protocol import Contestant, Method, tensor_nbytes

RATIOS = (4 / 3, 2.0, 8 / 3, 4.0, 8.0, 16.0)


class Shrunk(Method):
    """A model converted by cacheshrink."""

    packages = ("cacheshrink",)
    note = "not trained after conversion"

    def __init__(self, model: str, texts: list[str], method: str, ratio: float) -> None:
        self.model, self.texts = model, texts
        self.method, self.ratio, self.added = method, ratio, 0

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        from cacheshrink import convert_to_mla

        converted, _ = convert_to_mla(
            self.model,
            compression_ratio=self.ratio,
            compression_method=self.method,
            dtype=model.dtype,
            device=model.device,
            calibration_texts=self.texts,
            verbose=False,
        )
        if rotary_corrected(converted, rope_theta(model.config)):
            self.note += "; rotary base set by hand, cacheshrink misses it in this transformers"
        before, after = (tensor_nbytes(list(m.parameters())) for m in (model, converted))
        self.added = max(0, after - before)
        yield converted.eval()

    def fixed_nbytes(self, model: Any) -> int:
        return self.added


def rope_theta(config: Any) -> float:
    """A model's rotary base, wherever this transformers keeps it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    theta: Any = parameters.get("rope_theta") or getattr(config, "rope_theta", 10_000.0)
    return float(theta)


def rotary_corrected(converted: Any, base: float) -> bool:
    """Give converted attention the right rotary base for cached keys; whether it was wrong.

    cacheshrink reads `config.rope_theta`, which transformers 5 has moved, and takes 10,000 or none
    for it: without this every cached key would be rotated wrongly.
    """
    wrong = False
    for module in converted.modules():
        if type(module).__name__ == "MLAAttention":
            wrong |= not module._uses_rope or module._rope_config["base"] != base
            module._uses_rope, module._rope_config["base"] = True, base
    return wrong


def contestants(model: str, texts: str) -> list[Contestant]:
    """`model` is a hub id or directory; the file `texts` holds texts separated by form feeds."""

    def build(method: str, ratio: float) -> Method:
        return Shrunk(model, Path(texts).read_text(encoding="utf-8").split("\f"), method, ratio)

    return [
        Contestant(
            method="cacheshrink",
            setting=f"{method}, ratio {ratio:.3g}",
            family="low rank",
            build=partial(build, method, ratio),
        )
        for method in ("auto", "separate")
        for ratio in RATIOS
    ]
