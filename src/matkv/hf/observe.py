"""Second moments of what passes through a model's attention.

Shapes: B batch, H query head, G KV head, T token, D head dim."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from matkv.bases.maps import Maps
from matkv.bases.moments import LayerMoments, column_energy
from matkv.data.batch import Batch, Tokens
from matkv.errors import DataError, UnsupportedModelError
from matkv.hf.function import handled
from matkv.hf.geometry import attention_modules, geometry_of, output_projection
from matkv.ranks import LayerShape, Side


@dataclass(frozen=True)
class Progress:
    """Where a pass over text stands: tokens seen and seconds taken."""

    tokens: int
    seconds: float


OnProgress = Callable[[Progress], None]


@torch.inference_mode()
def collect_moments(
    model: PreTrainedModel,
    batches: Iterable[Tokens],
    *,
    skip_first: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[dict[int, LayerMoments], int]:
    """Second moments of every growing layer, and the number of tokens they were taken over.

    Raises:
        DataError: there is no token.
        UnsupportedModelError: the model's attention cannot be reproduced on latents.
    """
    geometry = geometry_of(model.config)
    counter = _Counter()
    recorders = {
        layer: _Recorder(geometry.layers[layer], geometry.query_heads, counter, model.device)
        for layer in geometry.growing
    }
    decoder = model.get_decoder()
    started = time.perf_counter()
    was_training = model.training
    try:
        model.eval()
        with handled(model, recorders):
            for tokens in batches:
                batch = Batch.of(tokens).to(model.device)
                counter.start(batch, skip_first)
                if batch.ids_BT.numel():
                    decoder(**batch.inputs(), use_cache=False)
                if on_progress is not None:
                    on_progress(Progress(counter.tokens, time.perf_counter() - started))
    finally:
        model.train(was_training)
    if counter.kept == 0:
        raise DataError("no token to calibrate on: the text is empty or all of it is skipped")
    modules = attention_modules(model)
    layers = {
        layer: recorder.moments(_output_moment(modules[layer], geometry.layers[layer]))
        for layer, recorder in recorders.items()
    }
    return layers, counter.kept


class _Counter:
    """The batch under way, shared by the recorders of all layers."""

    def __init__(self) -> None:
        self.tokens = self.kept = 0
        self.keep_BT: Tensor | None = None

    def start(self, batch: Batch, skip_first: int) -> None:
        real_BT = batch.real.bool()
        keep_BT = real_BT & (real_BT.cumsum(-1) > skip_first)
        self.tokens += batch.tokens
        self.kept += int(keep_BT.sum())
        self.keep_BT = None if bool(keep_BT.all()) else keep_BT


class _Recorder:
    """Sums the second moments of one layer's queries, keys and values in fp32."""

    def __init__(
        self, shape: LayerShape, query_heads: int, counter: _Counter, device: torch.device
    ) -> None:
        G, D = shape.kv_heads, shape.head_dim
        self.shape, self.query_heads, self.counter = shape, query_heads, counter
        self.key, self.query, self.value = (torch.zeros(G, D, D, device=device) for _ in range(3))

    def __call__(self, query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        G, D = self.shape.kv_heads, self.shape.head_dim
        for x, heads in ((key_BGTD, G), (value_BGTD, G), (query_BHTD, self.query_heads)):
            if x.shape[1] != heads or x.shape[3] != D:
                raise UnsupportedModelError(
                    f"a layer has {x.shape[1]} heads of width {x.shape[3]}; its config says "
                    f"{heads} of width {D}"
                )
        self._add(self.key, key_BGTD)
        self._add(self.value, value_BGTD)
        self._add(self.query, query_BHTD)

    def _add(self, sum_GDD: Tensor, x_BXTD: Tensor) -> None:
        x_BXTD = x_BXTD.float()
        if self.counter.keep_BT is not None:
            x_BXTD = x_BXTD * self.counter.keep_BT[:, None, :, None]
        # Query heads of a group follow one another, so they fold into their KV head's rows.
        x_GND = x_BXTD.transpose(0, 1).reshape(sum_GDD.shape[0], -1, x_BXTD.shape[-1])
        sum_GDD.baddbmm_(x_GND.mT, x_GND)

    def moments(self, output_GDD: Tensor) -> LayerMoments:
        kept = self.counter.kept
        key, query, value = (x.cpu() / kept for x in (self.key, self.query, self.value))
        return LayerMoments(key=key, query=query, value=value, output=output_GDD)


def _output_moment(module: nn.Module, shape: LayerShape) -> Tensor:
    """Σ W W^T over the query heads of each KV head, W [D M] a head's output projection.  [GDD]"""
    weight_XM = output_projection(module).weight.detach().float().cpu().T
    weight_GJDM = weight_XM.unflatten(0, (shape.kv_heads, -1, shape.head_dim))
    return torch.einsum("gjdm,gjem->gde", weight_GJDM, weight_GJDM)


@torch.no_grad()
def measure_energy(
    model: PreTrainedModel,
    layers: dict[int, dict[Side, Maps]],
    sequences: list[dict[str, Tensor]],
) -> dict[tuple[int, Side], Tensor]:
    """Share of energy in every column of new bases, on a few sequences.  [GD] each"""
    moments = {layer: _Moments() for layer in layers}
    with handled(model, moments):
        for sequence in sequences:
            ids_1T = sequence["input_ids"][None].to(model.device)
            model.get_decoder()(input_ids=ids_1T, use_cache=False)
    return {
        (layer, side): column_energy(moments[layer].sums[side].cpu(), maps)
        for layer, sides in layers.items()
        for side, maps in sides.items()
    }


class _Moments:
    """Observes one layer and sums second moments of its keys and values."""

    def __init__(self) -> None:
        self.sums: dict[Side, Tensor] = {}

    def __call__(self, query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        pairs: tuple[tuple[Side, Tensor], ...] = (("key", key_BGTD), ("value", value_BGTD))
        for side, x_BGTD in pairs:
            x_GND = x_BGTD.float().transpose(0, 1).flatten(1, 2)
            self.sums[side] = self.sums.get(side, 0) + x_GND.mT @ x_GND
