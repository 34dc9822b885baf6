"""One short try whether a model attends on latents as it does on keys and values.

Shapes: B batch, H query head, G KV head, T token, D head dim, M model dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from matkv.bases.maps import Maps
from matkv.cache.cache import LatentCache
from matkv.cache.naming import cache_argument
from matkv.errors import MatkvError, UnsupportedModelError
from matkv.hf.function import Handler, handled
from matkv.hf.geometry import attention_modules, geometry_of
from matkv.hf.handlers import Observed, OnLatents
from matkv.hf.wrappers import decoder_of, device_of, model_in
from matkv.ranks import LayerShape

TOKENS, STEP = 4, 2  # a prompt of two tokens, then two more
# Largest relative error at full rank. In half precision a mixture of experts may choose others.
TOLERANCE, HALF_TOLERANCE = 1e-2, 0.5


@torch.no_grad()
def check_attends(model: nn.Module) -> None:
    """Make sure that a model on latents of full rank, in a cache, gives what it gives without.

    Raises:
        UnsupportedModelError: it fails there, gives something else, or has other heads than its
            config says.
    """
    model = model_in(model)
    geometry, modules = geometry_of(model.config), attention_modules(model)
    compressed = {layer: geometry.layers[layer] for layer in geometry.compressed}
    plain_1TM = _hidden(
        model,
        {n: Observed(_Heads(n, shape, geometry.query_heads)) for n, shape in compressed.items()},
        TOKENS,
    )
    on_latents = {
        layer: _full(shape).to(device_of(modules[layer]), model.dtype)
        for layer, shape in compressed.items()
    }
    try:
        ours_1TM = _hidden(model, on_latents, STEP)
    except MatkvError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"the attention of {model.config.model_type} does more with keys and values than "
            f"attend to them ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
        ) from error
    off = float((ours_1TM - plain_1TM).norm() / plain_1TM.norm())
    if off > (TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE):
        raise UnsupportedModelError(
            f"{model.config.model_type} on latents of full rank is off by {off:.0%}"
        )


def _hidden(model: nn.Module, handlers: Mapping[int, Handler], step: int) -> Tensor:
    """Last hidden states of a few tokens, read `step` at a time through a cache.  [1TM]"""
    decoder = decoder_of(model)
    ids_1T = torch.arange(TOKENS, device=device_of(model))[None]
    with handled(model, handlers):
        given: dict[str, Cache] = {}
        if step < TOKENS:
            given = cache_argument(decoder, LatentCache(model_in(model)))
        outs = [
            decoder(input_ids=ids_1Q, **given, use_cache=bool(given))
            for ids_1Q in ids_1T.split(step, 1)
        ]
    return torch.cat([out.last_hidden_state for out in outs], dim=1).float()


class _Heads:
    """An observer that looks at nothing but the shapes."""

    def __init__(self, layer: int, shape: LayerShape, query_heads: int) -> None:
        self.layer, self.shape, self.query_heads = layer, shape, query_heads

    def __call__(self, query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        G, D = self.shape.kv_heads, self.shape.head_dim
        for x, heads in ((key_BGTD, G), (value_BGTD, G), (query_BHTD, self.query_heads)):
            if x.shape[1] != heads or x.shape[3] != D:
                raise UnsupportedModelError(
                    f"layer {self.layer} has {x.shape[1]} heads of width {x.shape[3]}; its config "
                    f"says {heads} of width {D}"
                )


def _full(shape: LayerShape) -> OnLatents:
    """All coordinates of a layer, as they are."""
    eye_GDD = torch.eye(shape.head_dim).expand(shape.kv_heads, -1, -1)
    maps, ranks = Maps.orthogonal(eye_GDD), (shape.head_dim,) * shape.kv_heads
    return OnLatents(maps, maps, ranks, ranks, window=shape.window)
