"""One size of a model, as a model of its own or for a while."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sentence_transformers import SentenceTransformer

from matkv.embeddings.depth import apply_cut, backbone_of, cut
from matkv.embeddings.rungs import Size, check, dimensions, full_size, name

logger = logging.getLogger(__name__)

TRAINED = "matkv_rungs"  # in config.json: the sizes that were trained
SERVED = "matryoshka_dimensions"  # there too, for servers: the dimensions good at this depth


def truncate(model: SentenceTransformer, layer: int, dim: int) -> SentenceTransformer:
    """The first `layer` layers and `dim` dimensions of `model`, an ordinary SentenceTransformer.

    It can be saved, and loads and serves wherever such models do. Its weights are those of `model`,
    not copies. Its config.json lists the sizes that were trained and fit in (`matkv_rungs`), and
    those of its dimensions that are good at its depth (`matryoshka_dimensions`, which vLLM reads).
    A size that was never trained is made too, with a warning.

    Raises:
        SizeError: the model has no such layer or dimension.
        UnsupportedModelError: it has no layers to cut.
    """
    full = full_size(model)
    ((layer, dim),) = check([(layer, dim)], full)
    warn_untrained(model, [(layer, dim)])
    small = _sharing_weights(model)
    backbone = backbone_of(small)
    apply_cut(backbone, layer)
    small.truncate_dim = dim if dim < full[1] else model.truncate_dim
    fit = [size for size in trained_sizes(model) if size[0] <= layer and size[1] <= dim]
    record(small, fit, (layer, dim))
    return small


@contextmanager
def truncated(model: SentenceTransformer, layer: int, dim: int | None = None) -> Iterator[None]:
    """In this context `model` has its first `layer` layers and `dim` dimensions, all unless given.

    The counterpart in depth of `model.truncate_embeddings(dim)`; afterwards, and after an error,
    the model is what it was.

    Raises:
        SizeError: the model has no such layer or dimension.
        UnsupportedModelError: it has no layers to cut.
    """
    backbone, full_dim = backbone_of(model), dimensions(model)
    check([(layer, full_dim if dim is None else dim)], (backbone.layers, full_dim))
    with (
        cut(backbone, layer),
        model.truncate_embeddings(model.truncate_dim if dim is None else dim),
    ):
        yield


def record(model: SentenceTransformer, sizes: Sequence[Size], full: Size) -> None:
    """Write the trained sizes into the config of `model` of size `full`, to be saved with it."""
    layer, dim = full
    config = _config(model)
    setattr(config, TRAINED, [list(size) for size in sizes])
    good = {size[1] for size in sizes if size[0] == layer}
    setattr(config, SERVED, sorted({*good, dim}))


def trained_sizes(model: SentenceTransformer) -> tuple[Size, ...]:
    """The sizes that `model` was trained for; none where nothing is recorded."""
    sizes = getattr(_config(model), TRAINED, None) or ()
    return tuple((int(layer), int(dim)) for layer, dim in sizes)


def warn_untrained(model: SentenceTransformer, sizes: Sequence[Size]) -> None:
    """Log a warning that names those of `sizes`, the full one excepted, that were never trained."""
    trained = trained_sizes(model)
    missing = [name(size) for size in sizes if size not in {*trained, full_size(model)}]
    if missing:
        known = ", ".join(map(name, trained)) or "none but the full size"
        logger.warning("size %s was never trained (trained: %s)", ", ".join(missing), known)


def _config(model: SentenceTransformer) -> Any:
    return model[0].model.config


def _sharing_weights(model: SentenceTransformer) -> SentenceTransformer:
    """A copy of all modules and settings around the same tensors and the same tokenizer."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    memo[id(model[0].processor)] = model[0].processor
    # The card knows the model and, once trained, the trainer with all that it holds.
    card = copy.copy(model.model_card_data)
    memo[id(model.model_card_data)] = card
    small = copy.deepcopy(model, memo)
    card.trainer = None
    card.register_model(small)
    return small
