"""Embeddings of many layers and dimensions from one pass through the model.

Shapes: B text, T token, H hidden, D dimension, L layer asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import Tensor, nn

from matkv.embeddings.depth import Backbone, backbone_of, evaluating, recording
from matkv.embeddings.rungs import Size, check, dimensions


class LayerEmbeddings(nn.Module):
    """A last module for a model: embeddings after each of `layers`, side by side.

    u_n = rest(norm(H_n)), where the rest is all that follows the backbone: pooling, dense layers,
    normalization, which `normalized` may leave out. It works under `recording`, where the highest
    layer is the model's own output.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        backbone: Backbone,
        layers: Iterable[int],
        *,
        normalized: bool = True,
    ) -> None:
        super().__init__()
        after = list(model)[1:]
        # In a tuple and not registered: these modules are the model's.
        self.rest = tuple(m for m in after if normalized or not isinstance(m, modules.Normalize))
        self.whole = len(self.rest) == len(after)
        self.norm = (backbone.norm,)
        self.layers = tuple(sorted(set(layers)))

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """`sentence_embedding` becomes the embeddings of all layers.  [B, L D]"""
        below = [self.norm[0](features["all_layer_embeddings"][n]) for n in self.layers[:-1]]
        parts = [self._after(features, states_BTH) for states_BTH in below]
        if self.whole:
            parts.append(features["sentence_embedding"])
        else:
            parts.append(self._after(features, features["token_embeddings"]))
        return {**features, "sentence_embedding": torch.cat(parts, dim=-1)}

    def split(self, wide_BX: Tensor, sizes: Iterable[Size]) -> dict[Size, Tensor]:
        """The embeddings of `sizes` out of what `forward` has put side by side.  [B, D each]"""
        parts = wide_BX.tensor_split(len(self.layers), dim=-1)
        by_layer = dict(zip(self.layers, parts, strict=True))
        return {(layer, dim): by_layer[layer][..., :dim] for layer, dim in sizes}

    def _after(self, features: dict[str, Any], states_BTH: Tensor) -> Tensor:
        dropped = ("sentence_embedding", "all_layer_embeddings")
        out = {name: value for name, value in features.items() if name not in dropped}
        out["token_embeddings"] = states_BTH
        for module in self.rest:
            out = module(out)
        embedding_BD: Tensor = out["sentence_embedding"]
        return embedding_BD


@contextmanager
def joint(
    model: SentenceTransformer, sizes: Sequence[Size]
) -> Iterator[tuple[SentenceTransformer, LayerEmbeddings]]:
    """A model around the modules of `model` that encodes all layers of `sizes` at once.

    `model` itself is used by nobody else meanwhile, and is afterwards what it was before.

    Raises:
        SizeError, UnsupportedModelError: the model has no such sizes, or none at all.
    """
    backbone = backbone_of(model)
    check(sizes, (backbone.layers, dimensions(model)))
    layers = [layer for layer, _ in sizes]
    heads = LayerEmbeddings(model, backbone, layers)
    with evaluating(model), recording(backbone, layers):
        yield (
            SentenceTransformer(
                modules=[*model, heads],
                device=str(model.device),
                prompts=model.prompts,
                default_prompt_name=model.default_prompt_name,
            ),
            heads,
        )


def encode_rungs(
    model: SentenceTransformer,
    texts: Sequence[str],
    rungs: Sequence[Size],
    *,
    batch_size: int = 32,
    prompt: str | None = None,
    prompt_name: str | None = None,
    normalize: bool = False,
    progress: bool = False,
) -> dict[Size, np.ndarray[Any, Any]]:
    """The embeddings of `texts` at every size, from one pass up to the highest layer.

    Bit-equal to `truncate(model, layer, dim).encode(texts)`. With them a small size makes a
    shortlist and a large one orders it. `normalize` scales every embedding to length 1, after its
    dimensions are cut.

    Returns:
        An array [texts, dim] for each size.

    Raises:
        SizeError, UnsupportedModelError: the model has no such sizes, or none at all.
    """
    with joint(model, rungs) as (wide, heads):
        wide_BX = wide.encode(
            list(texts),
            batch_size=batch_size,
            prompt=prompt,
            prompt_name=prompt_name,
            show_progress_bar=progress,
            convert_to_tensor=True,
        )
    if not len(texts):
        return {size: np.zeros((0, size[1]), dtype=np.float32) for size in rungs}
    found = heads.split(wide_BX, rungs)
    if normalize:
        found = {size: nn.functional.normalize(u_BD, dim=-1) for size, u_BD in found.items()}
    # Contiguous copies: one size must not keep all the others in memory.
    return {size: np.ascontiguousarray(as_array(u_BD)) for size, u_BD in found.items()}


def as_array(embeddings_BD: Tensor) -> np.ndarray[Any, Any]:
    """As numpy, which has no bfloat16."""
    embeddings_BD = embeddings_BD.detach().cpu()
    if embeddings_BD.dtype == torch.bfloat16:
        embeddings_BD = embeddings_BD.float()
    array: np.ndarray[Any, Any] = embeddings_BD.numpy()
    return array
