"""What passes through a model's attention, and the second moments of it.

Shapes: B batch, H query head, G KV head, T token, D head dim, M model dim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from matkv.bases.maps import Maps
from matkv.bases.moments import LayerMoments, column_energy
from matkv.bases.quantizer import Quantizer, fit
from matkv.data.batch import Batch, Tokens
from matkv.errors import DataError, UnsupportedModelError
from matkv.hf.function import handled
from matkv.hf.geometry import attention_modules, geometry_of
from matkv.hf.handlers import Observed, Observer
from matkv.hf.probe import check_attends
from matkv.hf.weights import output_projection, weight_of
from matkv.hf.wrappers import decoder_of, device_of, model_in
from matkv.progress import OnProgress, Report
from matkv.ranks import SIDES, LayerShape, Side


@torch.no_grad()
def observe(model: nn.Module, observers: Mapping[int, Observer], batches: Iterable[Tokens]) -> None:
    """Run a model's decoder over batches, without a cache; observers see their layer's attention.

    Raises:
        MatkvError: the model is attached.
    """
    decoder, device = decoder_of(model), device_of(model)
    with handled(model, {layer: Observed(observer) for layer, observer in observers.items()}):
        for batch in batches:
            decoder(**Batch.of(batch).to(device).inputs(), use_cache=False)


# Not in inference mode: some packages of packed weights fail there.
@torch.no_grad()
def collect_moments(
    model: nn.Module,
    batches: Iterable[Tokens],
    *,
    skip_first: int = 0,
    windows: bool = True,
    on_progress: OnProgress | None = None,
) -> tuple[dict[int, LayerMoments], int]:
    """Second moments of every compressed layer, and the number of tokens they were taken over.

    Without `windows` layers with a sliding window are none of them.

    Raises:
        DataError: there is no token, or something that is none.
        UnsupportedModelError: the model's attention cannot be reproduced on latents, or has values
            that are not finite.
    """
    model = model_in(model)
    if not isinstance(batches, Iterable):
        raise DataError(f"batches are {str(batches)[:40]}: give a list of tensors of token ids")
    geometry = geometry_of(model.config, windows=windows)
    counter = _Counter(skip_first, model.config.get_text_config(decoder=True).vocab_size)
    recorders = {layer: Recorder(geometry.layers[layer], counter) for layer in geometry.compressed}
    report = Report(on_progress, "calibrating", None)

    def counted() -> Iterator[Batch]:
        for batch in map(Batch.of, batches):
            counter.start(batch)
            if batch.ids_BT.numel():
                yield batch  # comes back when the batch has passed
                _check_finite(recorders)
            report(counter.tokens)

    was_training = model.training
    try:
        model.eval()
        check_attends(model)
        observe(model, recorders, counted())
    finally:
        model.train(was_training)
    if counter.kept == 0:
        raise DataError("no token to calibrate on: the text is empty or all of it is skipped")
    modules = attention_modules(model)
    layers = {}
    for layer, recorder in recorders.items():
        weight_MX = weight_of(output_projection(modules[layer]), model.dtype)
        layers[layer] = recorder.moments(_output_moment(weight_MX, geometry.layers[layer]))
        if not layers[layer].output.isfinite().all():
            raise _not_finite(layer, "output projection")
    return layers, counter.kept


def measure_energy(
    model: nn.Module,
    layers: Mapping[int, Mapping[Side, Maps]],
    sequences: Iterable[Mapping[str, Tensor]],
) -> dict[tuple[int, Side], Tensor]:
    """Share of energy in every column of new bases, on a few sequences [T].  [GD] each"""
    geometry = geometry_of(model_in(model).config)
    recorders = {layer: Recorder(geometry.layers[layer], queries=False) for layer in layers}
    observe(model, recorders, (one["input_ids"][None] for one in sequences))
    return {
        (layer, side): column_energy(recorders[layer].sums[side].cpu(), maps)
        for layer, sides in layers.items()
        for side, maps in sides.items()
    }


def fit_quantizers(
    model: nn.Module,
    layers: Mapping[int, Mapping[Side, Maps]],
    sequences: Iterable[Mapping[str, Tensor]],
    *,
    sink: int = 0,
) -> dict[tuple[int, Side], Quantizer]:
    """Quantizers for bases, from the latents of a few sequences [T] but for their first tokens."""
    seen: dict[tuple[int, Side], list[Tensor]] = {}

    def watch(layer: int) -> Observer:
        def see(_: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
            for side, x_BGTD in zip(SIDES, (key_BGTD, value_BGTD), strict=True):
                encode_GDD = layers[layer][side].encode_XDD
                z_BGTD = x_BGTD[:, :, sink:].float() @ encode_GDD.to(x_BGTD.device)
                seen.setdefault((layer, side), []).append(z_BGTD.transpose(0, 1).flatten(1, 2))

        return see

    observers = {layer: watch(layer) for layer in layers}
    observe(model, observers, (one["input_ids"][None] for one in sequences))
    return {name: fit(torch.cat(parts, dim=1)).changed(Tensor.cpu) for name, parts in seen.items()}


class _Counter:
    """The batch under way, shared by the recorders of all layers."""

    def __init__(self, skip_first: int = 0, vocabulary: int = 1) -> None:
        self.skip_first, self.vocabulary = skip_first, vocabulary
        self.tokens = self.kept = 0
        self.keep_BT: Tensor | None = None

    def start(self, batch: Batch) -> None:
        """Raises:
        DataError: the ids are not the model's.
        """
        least, most = map(int, batch.ids_BT.aminmax()) if batch.ids_BT.numel() else (0, 0)
        if not 0 <= least <= most < self.vocabulary:
            raise DataError(
                f"token ids from {least} to {most} are not all of the model's {self.vocabulary}: "
                "use its own tokenizer"
            )
        real_BT = batch.real.bool()
        keep_BT = real_BT & (real_BT.cumsum(-1) > self.skip_first)
        self.tokens += batch.tokens
        self.kept += int(keep_BT.sum())
        self.keep_BT = None if bool(keep_BT.all()) else keep_BT


class Recorder:
    """Sums the second moments of one layer's keys and values in fp32, and of its queries."""

    def __init__(
        self, shape: LayerShape, counter: _Counter | None = None, *, queries: bool = True
    ) -> None:
        self.shape, self.queries = shape, queries
        self.counter = counter or _Counter()
        self.sums: dict[str, Tensor] = {}

    def __call__(self, query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        self._add("key", key_BGTD)
        self._add("value", value_BGTD)
        if self.queries:
            self._add("query", query_BHTD)

    def _add(self, name: str, x_BXTD: Tensor) -> None:
        G, D = self.shape.kv_heads, self.shape.head_dim
        x_BXTD = x_BXTD.float()
        if self.counter.keep_BT is not None:
            keep_BT = self.counter.keep_BT.to(x_BXTD.device)
            x_BXTD = x_BXTD * keep_BT[:, None, :, None]
        if name not in self.sums:
            self.sums[name] = x_BXTD.new_zeros(G, D, D)
        # Query heads of a group follow one another, so they fold into their KV head's rows.
        x_GND = x_BXTD.transpose(0, 1).reshape(G, -1, D)
        self.sums[name].baddbmm_(x_GND.mT, x_GND)

    def total(self) -> Tensor:
        """One number, not finite as soon as any of the moments is not."""
        return torch.stack([one.sum() for one in self.sums.values()]).sum().cpu()

    def moments(self, output_GDD: Tensor) -> LayerMoments:
        means = {name: one.cpu() / self.counter.kept for name, one in self.sums.items()}
        return LayerMoments(**means, output=output_GDD)


def _check_finite(recorders: Mapping[int, Recorder]) -> None:
    totals = torch.stack([recorder.total() for recorder in recorders.values()])
    for layer, is_finite in zip(recorders, totals.isfinite().tolist(), strict=True):
        if not is_finite:
            raise _not_finite(layer, "queries, keys or values")


def _not_finite(layer: int, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {layer} has {what} that are not finite: load the model in bfloat16 or float32, and "
        "see whether its weights are sound"
    )


def _output_moment(weight_MX: Tensor, shape: LayerShape) -> Tensor:
    """Σ W W^T over the query heads of each KV head, W [D M] a head's output projection.  [GDD]"""
    weight_XM = weight_MX.float().cpu().T
    weight_GJDM = weight_XM.unflatten(0, (shape.kv_heads, -1, shape.head_dim))
    return torch.einsum("gjdm,gjem->gde", weight_GJDM, weight_GJDM)
