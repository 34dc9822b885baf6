"""Every size of a model measured by any evaluator of sentence-transformers, from one encode."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util.quantization import quantize_embeddings
from torch import Tensor, nn

from matkv.embeddings.layers import LayerEmbeddings, as_array, joint
from matkv.embeddings.rungs import Size, default_rungs, full_size, name
from matkv.embeddings.serve import trained_sizes
from matkv.errors import SizeError

logger = logging.getLogger(__name__)

SHADES = " ░▒▓█"


class RungEvaluator(BaseEvaluator):
    """Any evaluator, at several sizes: its main metric for each, and their mean.

    Metrics are `<name>_1x32`, `<name>_2x64`, … and `<name>_mean`, which is the main one: a
    checkpoint is judged by all sizes. Texts are encoded once for all of them, and the model is
    afterwards what it was before.

    Raises:
        SizeError: no size is given, the evaluator truncates by itself, or the model lacks a size.
    """

    def __init__(
        self, evaluator: BaseEvaluator, rungs: Sequence[Size], name: str | None = None
    ) -> None:
        super().__init__()
        if not rungs:
            raise SizeError("no size is given: name at least one, as 2x64")
        if getattr(evaluator, "truncate_dim", None) is not None:
            raise SizeError("the evaluator has a truncate_dim: leave it out, the sizes say it")
        self.evaluator, self.rungs = evaluator, tuple(rungs)
        self.name = name if name is not None else getattr(evaluator, "name", "")
        self.greater_is_better = evaluator.greater_is_better
        self.primary_metric = "_".join(filter(None, (self.name, "mean")))

    def __call__(
        self,
        model: SentenceTransformer,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        """The metrics of `model`.

        Raises:
            SizeError, UnsupportedModelError: the model has no such sizes, or none at all.
        """
        values: dict[str, float] = {}
        with views(model, self.rungs) as each:
            for size, view in each.items():
                values[name(size)] = self._value(self.evaluator(view, None, epoch, steps))
        values["mean"] = math.fsum(values.values()) / len(values)
        metrics: dict[str, float] = self.prefix_name_to_metrics(values, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def _value(self, result: float | dict[str, float]) -> float:
        if not isinstance(result, dict):
            return float(result)
        return float(result[str(self.evaluator.primary_metric)])

    @property
    def metric(self) -> str:
        """The main metric of the evaluator inside, known once it has run."""
        metric = str(self.evaluator.primary_metric or type(self.evaluator).__name__)
        inside = getattr(self.evaluator, "name", "")
        return metric.removeprefix(f"{inside}_") if inside else metric

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the evaluator."""
        return {"rungs": ", ".join(map(name, self.rungs)), **self.evaluator.get_config_dict()}


@contextmanager
def views(
    model: SentenceTransformer, sizes: Sequence[Size]
) -> Iterator[dict[Size, SentenceTransformer]]:
    """One view of `model` for each size, whose `encode` gives embeddings of that size.

    All views encode a list of texts together, when the first of them is asked.
    """
    with joint(model, sizes) as (wide, heads):
        shared = _Shared(wide, heads, tuple(sizes))
        kind = type("RungView", (_Encodes, type(model)), {})
        each: dict[Size, SentenceTransformer] = {}
        for size in sizes:
            view: Any = copy.copy(model)
            view.__dict__.pop("forward", None)  # losses that wrap it may have left one
            view.__class__ = kind
            view.rung, view.shared, view.truncate_dim = size, shared, size[1]
            # An evaluator writes what it finds into the card; the sizes' means are what counts.
            view.model_card_data = _NoCard()
            each[size] = view
        yield each


class _NoCard:
    """A model card that keeps nothing."""

    def set_evaluation_metrics(self, *_: Any) -> None:
        return None


class _Shared:
    """Embeddings of all sizes, kept by what was encoded and how."""

    def __init__(
        self, wide: SentenceTransformer, heads: LayerEmbeddings, sizes: tuple[Size, ...]
    ) -> None:
        self.wide, self.heads, self.sizes = wide, heads, sizes
        self.kept: dict[tuple[Any, str], Tensor] = {}

    def embeddings(self, inputs: list[Any], options: dict[str, Any], size: Size) -> Tensor:
        key = (tuple(map(repr, inputs)), repr(sorted(options.items())))
        if key not in self.kept:
            self.kept[key] = self.wide.encode(inputs, convert_to_tensor=True, **options)
        wide_BX = self.kept[key]
        return self.heads.split(wide_BX, [size])[size] if len(inputs) else wide_BX


# How `encode` hands on what it found; the rest of its arguments say what is encoded.
_FORMS = ("convert_to_numpy", "convert_to_tensor", "normalize_embeddings", "precision")


class _Encodes:
    """`SentenceTransformer.encode` out of the embeddings of all sizes."""

    rung: Size
    shared: _Shared

    def encode(self, *args: Any, **given: Any) -> Any:
        """As the method of this name, but for sizes of its own and single vectors only."""
        bound = inspect.signature(SentenceTransformer.encode).bind(self, *args, **given)
        bound.apply_defaults()
        options = dict(bound.arguments)
        options.pop("self")
        options |= options.pop("kwargs", {})
        inputs = options.pop("inputs")
        form = {option: options.pop(option) for option in _FORMS}
        self._check(options.pop("truncate_dim"), options["output_value"])
        single = self.is_singular_input(inputs)  # type: ignore[attr-defined]
        texts = [inputs] if single else list(inputs)
        found = _formed(self.shared.embeddings(texts, options, self.rung), form)
        return found[0] if single else found

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refused: what an evaluator computes by itself would be the full size's."""
        raise SizeError("an evaluator that does not call encode cannot be run by size")

    def _check(self, truncate_dim: int | None, output_value: str | None) -> None:
        if truncate_dim not in (None, self.rung[1]):
            raise SizeError(f"truncate_dim {truncate_dim} of an evaluator: the sizes say it")
        if output_value != "sentence_embedding":
            raise SizeError(f"an evaluator that reads {output_value!r} cannot be run by size")


def _formed(embeddings_BD: Tensor, form: dict[str, Any]) -> Any:
    """Normalized, quantized and converted as `encode` was asked to."""
    if form["normalize_embeddings"]:
        embeddings_BD = nn.functional.normalize(embeddings_BD, dim=-1)
    found: Any = embeddings_BD
    if form["precision"] not in (None, "float32"):
        found = quantize_embeddings(as_array(embeddings_BD), precision=form["precision"])
    if form["convert_to_tensor"]:
        return torch.as_tensor(found)
    if form["convert_to_numpy"]:
        return as_array(found) if isinstance(found, Tensor) else found
    return list(torch.as_tensor(found))


@dataclass(frozen=True)
class RungTable:
    """What every size of a model scores: values by (layer, dimension).

    `metric` is the evaluator's, `trained` the sizes that the model was trained for.
    """

    metric: str
    values: dict[Size, float]
    trained: tuple[Size, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over all sizes of the table."""
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the table."""
        return tuple(sorted({layer for layer, _ in self.values}))

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of the table."""
        return tuple(sorted({dim for _, dim in self.values}))

    def to_json(self) -> list[dict[str, Any]]:
        """A record for each size."""
        return [
            {
                "layer": size[0],
                "dim": size[1],
                "metric": self.metric,
                "value": value,
                "trained": size in self.trained,
            }
            for size, value in self.values.items()
        ]

    def __str__(self) -> str:
        """The grid as a heat map of text: layers down, dimensions across, darker for more."""
        found = [value for value in self.values.values() if math.isfinite(value)]
        low, high = (min(found), max(found)) if found else (0.0, 0.0)
        lines = ["layer " + " ".join(f"{dim:>7}" for dim in self.dims)]
        for layer in self.layers:
            cells = (self._cell((layer, dim), low, high) for dim in self.dims)
            lines.append(f"{layer:>5} " + " ".join(cells))
        return "\n".join([f"{self.metric}, * trained", *lines])

    def _cell(self, size: Size, low: float, high: float) -> str:
        if size not in self.values:
            return " " * 7
        value = self.values[size]
        share = (value - low) / (high - low) if high > low else 1.0
        shade = SHADES[round(share * (len(SHADES) - 1))] if math.isfinite(share) else " "
        return f"{value:5.3f}{shade}{'*' if size in self.trained else ' '}"


def rung_table(
    model: SentenceTransformer,
    evaluator: BaseEvaluator,
    rungs: Sequence[Size] | None = None,
    *,
    grid: bool = False,
) -> RungTable:
    """What every size of `model` scores with any evaluator of sentence-transformers.

    The sizes are `rungs`, or those the model was trained for, or `default_rungs`; with `grid` all
    layers at all dimensions of these, from one encode whatever their number.

    Raises:
        SizeError, UnsupportedModelError: the model has no such sizes, or none at all.
    """
    full = full_size(model)
    trained = trained_sizes(model)
    sizes: Sequence[Size] = rungs or trained or default_rungs(*full)
    if grid:
        dims = sorted({dim for _, dim in sizes})
        sizes = tuple(product(range(1, full[0] + 1), dims))
    measure = RungEvaluator(evaluator, sizes, name="")
    metrics = measure(model)
    return RungTable(measure.metric, {size: metrics[name(size)] for size in sizes}, trained)
