"""The local stage: every layer's bases fitted to that layer's attention output, all by themselves.

    loss = mean over layers of  ‖out' W - out W‖² / ‖out W‖²      W the layer's output projection

on queries, keys and values recorded with the full cache; the `recent` tokens before a query are
exact. There is no vocabulary, no backward pass through the model, and one layer's graph at a time.

Shapes: B sequence, H query head, G KV head, T token, D head dim, M model dim, X matrices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from matkv.bases.gates import Projected
from matkv.bases.learned import ADAM_EPSILON
from matkv.data.batch import Batch
from matkv.distill.bases import Bases
from matkv.distill.config import DistillConfig
from matkv.distill.examples import TrainingSet, as_batch
from matkv.errors import TrainingError
from matkv.hf.function import Call
from matkv.hf.geometry import attention_modules
from matkv.hf.handlers import OnTruncated
from matkv.hf.observe import observe
from matkv.hf.weights import output_projection, weight_of
from matkv.progress import Interrupt, OnProgress, Report, Spent
from matkv.ranks import Geometry

# Recorded queries, keys and values of one round stay under this many bytes.
RECORD_BYTES = 2 << 30


@dataclass
class Recorder:
    """Observes one layer and keeps its queries, keys and values, one [1·TD] a sequence."""

    query: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)

    def __call__(self, query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        for kept, x in ((self.query, query_BHTD), (self.key, key_BGTD), (self.value, value_BGTD)):
            kept += x.split(1)

    def pick(self, sequences: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of some sequences, zeros after their end.  [B·TD] each"""
        query, key, value = (
            _stacked([kept[index] for index in sequences])
            for kept in (self.query, self.key, self.value)
        )
        return query, key, value


@dataclass(frozen=True)
class LocalBatch:
    """What one step fits: `picks` of the recorded sequences, a `batch`, at ranks `sizes_BKX`."""

    recorders: dict[int, Recorder]
    picks: list[int]
    batch: Batch
    sizes_BKX: Tensor


def fit_locally(
    model: PreTrainedModel,
    bases: Bases,
    data: TrainingSet,
    config: DistillConfig,
    *,
    recent: int,
    interrupt: Interrupt,
    on_progress: OnProgress | None = None,
) -> Spent:
    """Fit `bases` layer by layer; a token counts each time it is used.

    The `recent` tokens before a query are exact, as in the cache that the bases are for. Under
    several processes each does the same work.

    Raises:
        TrainingError: the loss is not a finite number.
    """
    optimizer = torch.optim.Adam(bases.parameters(), lr=config.local.lr, eps=ADAM_EPSILON)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.local.steps)
    modules = attention_modules(model)
    report = Report(on_progress, "local", config.local.steps, "steps")
    spent = Spent(0, 0, 0.0)
    for step, batch in enumerate(_batches(model, bases.geometry, data, config), start=1):
        loss = _backward(bases, modules, batch, recent)
        if not math.isfinite(loss):
            raise TrainingError(f"the local loss is {loss} at step {step}: lower local_lr")
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        tokens = spent.tokens + batch.batch.tokens
        spent = Spent(step, tokens, time.perf_counter() - report.started)
        left = spent.seconds / step * (config.local.steps - step)
        figures = {"loss": loss, "tokens": tokens}
        report(step, f"loss {loss:.3f}", seconds_left=left, figures=figures)
        if interrupt.agreed(model.device):
            break
    return spent


def _batches(
    model: PreTrainedModel, geometry: Geometry, data: TrainingSet, config: DistillConfig
) -> Iterator[LocalBatch]:
    """Record as many sequences as memory allows, use each `local_reuse` times, and go on."""
    size, step, first = config.local.batch_size, 0, 0
    wanted = -(-config.local.steps * size // config.local.reuse)
    generator = torch.Generator().manual_seed(config.seed)
    while step < config.local.steps:
        items = [data.example(first)]
        room = RECORD_BYTES // (recorded_nbytes(geometry, model.dtype) * len(items[0]["input_ids"]))
        count = max(size, min(wanted, room))
        items += [data.example(first + index) for index in range(1, count)]
        recorders = {layer: Recorder() for layer in geometry.compressed}
        observe(model, recorders, (item["input_ids"][None] for item in items))
        for _ in range(config.local.reuse):
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            for start in range(0, count - size + 1, size):
                drawn = [data.sizes(step * size + index) for index in range(size)]
                picks = order[start : start + size]
                batch = as_batch([items[index] for index in picks])
                yield LocalBatch(recorders, picks, batch, torch.stack(drawn))
                step += 1
                if step == config.local.steps:
                    return
        first += count


def _backward(bases: Bases, modules: list[nn.Module], batch: LocalBatch, recent: int) -> float:
    """Add one step's gradients to the parameters of `bases`; returns the loss."""
    device = next(bases.parameters()).device
    products = bases(batch.sizes_BKX.transpose(0, 1).flatten(0, 1).to(device))
    # Layers go backwards to the products one by one, and all products to the parameters at once.
    leaves = {place: product.detach().requires_grad_() for place, product in products.items()}
    total = 0.0
    for layer, recorder in batch.recorders.items():
        product = Projected(recent)
        product.key, product.value = leaves[layer, "key"], leaves[layer, "value"]
        keep_BT = batch.batch.real.to(device, next(modules[layer].parameters()).dtype)
        loss = layer_loss(modules[layer], product, *recorder.pick(batch.picks), keep_BT)
        (loss / len(batch.recorders)).backward()
        total += float(loss.detach()) / len(batch.recorders)
    grads = [leaves[place].grad for place in products]
    torch.autograd.backward(list(products.values()), grads)
    return total


def layer_loss(
    module: nn.Module,
    projected: Projected,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    keep_BT: Tensor,
) -> Tensor:
    """Relative squared error of one layer's attention output after the output projection.

    `projected` may hold matrices for K times as many sequences; each sequence is then met K times.
    """
    weight_MX = weight_of(output_projection(module), query_BHTD.dtype)
    scaling = getattr(module, "scaling", None)
    states = query_BHTD, key_BGTD, value_BGTD
    with torch.no_grad():
        teacher_BTHD = Call(module, *states, None, scaling, 0.0).usual(key_BGTD, value_BGTD)
        teacher_BTX = teacher_BTHD.flatten(2) * keep_BT[..., None]
        scale = F.linear(teacher_BTX, weight_MX).float().square().sum()
    assert projected.key is not None
    K = len(projected.key) // len(query_BHTD)
    query, key, value = (x.repeat(K, 1, 1, 1) for x in states)
    student_BTHD = OnTruncated(projected).attend(
        Call(module, query, key, value, None, scaling, 0.0)
    )
    student_BTX = student_BTHD.flatten(2) * keep_BT.repeat(K, 1)[..., None]
    error_BTM = F.linear(student_BTX - teacher_BTX.repeat(K, 1, 1), weight_MX)
    return error_BTM.float().square().sum() / (K * scale)


def _stacked(rows: list[Tensor]) -> Tensor:
    longest = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, 0, 0, longest - row.shape[2])) for row in rows])


def recorded_nbytes(geometry: Geometry, dtype: torch.dtype) -> int:
    """Bytes of what is recorded of one token."""
    compressed = [geometry.layers[layer] for layer in geometry.compressed]
    queries = sum(geometry.query_heads * shape.head_dim for shape in compressed)
    return (queries + geometry.columns) * dtype.itemsize
