"""Training steps of a whole model with everything sharded by FSDP, beside the same steps without.

One process on one GPU: what is shown is that the student trains under FSDP at full size, learns the
same, and what sharding itself costs. Part of `benchmarks/gpu.py`.

Shapes: B sequence, T token.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig

from matkv.artifact.artifact import Artifact
from matkv.bases.learned import ADAM_EPSILON
from matkv.benchmark.decode import random_model
from matkv.calibrate import calibrate
from matkv.distill.bases import Bases, rank_axes
from matkv.distill.examples import TrainingSet, collate
from matkv.distill.losses import LossWeights
from matkv.distill.student import Student
from matkv.schedule import Independent

CLOSE = 2e-2  # how far losses in bf16 may be apart, relative


@dataclass(frozen=True, kw_only=True)
class Training:
    """`steps` training steps of `batch` random sequences of `length` tokens."""

    device: str
    dtype: torch.dtype
    model: LlamaConfig
    batch: int
    length: int
    steps: int


def sharded_training(plan: Training) -> Iterator[dict[str, Any]]:
    """A row without and one with FSDP: milliseconds of the last step, peak bytes, losses.

    Both start from the same weights, bases and batches; `passes` says that losses agree.
    """
    model = random_model(plan.model, plan.dtype, device=plan.device)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(1, plan.model.vocab_size, (plan.batch, plan.length), generator=generator)
    artifact = calibrate(model, [ids_BT[:1]])
    axes = rank_axes(artifact.geometry)
    data = TrainingSet(
        ids_BT, Independent(axes), batch_size=plan.batch, steps=plan.steps, draw="sequence", seed=0
    )
    batches = [
        {name: x.to(plan.device) for name, x in collate(list(_step_of(data, plan, step))).items()}
        for step in range(plan.steps)
    ]
    model.requires_grad_(False)
    plain = _trained(model, artifact, batches, plan, shard=False)
    yield {"way": "one process"} | plain
    with one_process(plan.device):
        sharded = _trained(model, artifact, batches, plan, shard=True)
    pairs = zip(plain["losses"], sharded["losses"], strict=True)
    apart = max(abs(one - other) / abs(one) for one, other in pairs)
    yield {"way": "FSDP, one process"} | sharded | {"apart": apart, "passes": apart <= CLOSE}


def _step_of(data: TrainingSet, plan: Training, step: int) -> Iterator[Any]:
    for index in range(plan.batch):
        yield data[step * plan.batch + index]


def _trained(
    model: Any, artifact: Artifact, batches: list[dict[str, Tensor]], plan: Training, *, shard: bool
) -> dict[str, Any]:
    """A few steps of Adam on bases that start anew."""
    bases = Bases(artifact, "cayley").to(plan.device)
    student = Student(model, bases, LossWeights(kl=0.25, ce=0.75))
    if shard:
        # Frozen layers in one group each, the bases in their own, everything else in the root's.
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(student.bases)
        fully_shard(student)
    optimizer = torch.optim.Adam(student.bases.parameters(), lr=1e-3, eps=ADAM_EPSILON)
    losses, took = [], 0.0
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with student.attending(), warnings.catch_warnings():
        # Maps are views of one parameter; nothing is done to them in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        for batch in batches:
            started = time.perf_counter()
            loss = student(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))  # waits for the device
            took = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if plan.device == "cuda" else None
    return {"step_ms": 1e3 * took, "peak_bytes": peak, "losses": losses}


@contextmanager
def one_process(device: str) -> Iterator[None]:
    """A process group of this process alone."""
    with TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{Path(folder) / 'store'}",
            rank=0,
            world_size=1,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()
