"""Two processes learn what one learns from the same global batch."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from matkv.distill.bases import Bases, rank_axes
from matkv.distill.config import DistillConfig, LocalSettings
from matkv.distill.examples import TrainingSet, collate
from matkv.distill.losses import LossWeights
from matkv.distill.stage import distill
from matkv.distill.student import Student
from matkv.progress import Progress
from matkv.ranks import SIDES
from matkv.schedule import Independent
from tiny import tiny, tokens

LENGTHS = (10, 16, 12, 16, 9, 14, 16, 11)
Found = dict[str, Any]


def learn(folder: Path) -> Found:
    """Losses and bases of a short run on sequences of different lengths."""
    subject, losses = tiny("llama"), []

    def keep(progress: Progress) -> None:
        losses.append(progress.figures["loss"])

    config = DistillConfig(
        objective="both",
        local=LocalSettings(steps=2, batch_size=2),
        steps=4,
        minutes=10.0,
        sequence_length=16,
        micro_batch_size=1,
        warmup_steps=0,
        checkpoint_every=2,
    )
    examples = [
        {
            "input_ids": ids_T[:length],
            "labels": ids_T[:length].where(torch.arange(length) > 2, -100),
        }
        for ids_T, length in zip(tokens(8, 16), LENGTHS, strict=True)
    ]
    checkpoints = folder / f"checkpoints-{os.environ.get('WORLD_SIZE', '1')}"
    made = distill(
        subject.model,
        subject.artifact,
        examples,
        config,
        checkpoints=checkpoints,
        on_progress=keep,
    )
    bases = [
        made.maps(layer, side).encode_XDD for layer in made.geometry.compressed for side in SIDES
    ]
    return {"losses": losses, "bases": torch.stack(bases)}


def gradients(batch: dict[str, Tensor], *, shard: bool) -> Found:
    """Loss and gradients of one batch, with everything sharded or not."""
    subject = tiny("llama")
    bases = Bases(subject.artifact, "cayley")
    with torch.no_grad():
        for parameter in bases.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    subject.model.requires_grad_(False)
    student = Student(subject.model, bases, LossWeights(kl=0.5, ce=0.5))
    if shard:
        # Frozen layers in one group each, the bases in their own, everything else in the root's.
        for layer in subject.model.model.layers:
            fully_shard(layer)
        fully_shard(student.bases)
        fully_shard(student)
    with student.attending():
        loss = student(**batch)["loss"]
        loss.backward()
    grads: list[Any] = [parameter.grad for parameter in bases.parameters()]
    whole = [grad.full_tensor() if shard else grad for grad in grads]
    return {"loss": loss.detach(), "grads": torch.cat(whole)}


def half() -> Found:
    """The gradients of this process's half of the batch, sharded over both processes."""
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    found = gradients({name: x[rows] for name, x in sharded_batch().items()}, shard=True)
    dist.all_reduce(found["loss"])
    found["loss"] /= 2
    return found


def sharded_batch() -> dict[str, Tensor]:
    axes = rank_axes(tiny("llama").artifact.geometry)
    data = TrainingSet(
        tokens(4, 12), Independent(axes), batch_size=4, steps=1, draw="sequence", seed=0
    )
    return collate([data[position] for position in range(4)])


def process(rank: int, port: int, folder: Path) -> None:
    """One of two processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    learned = learn(folder)  # joins the process group, by way of accelerate
    torch.save({"learn": learned, "half": half()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two processes finds."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    both = [context.Process(target=process, args=(rank, port, folder)) for rank in (0, 1)]
    for one in both:
        one.start()
    try:
        for one in both:
            one.join(300)
            assert one.exitcode == 0
    finally:
        for one in both:
            one.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as the two processes use, for the same order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_learn_what_one_learns(by_two: list[Found], tmp_path: Path) -> None:
    alone, (first, second) = learn(tmp_path), (found["learn"] for found in by_two)
    # The second process reports its local stage only: the first speaks for both afterwards.
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert second["losses"] == first["losses"][:2]
    torch.testing.assert_close(first["bases"], alone["bases"], rtol=0, atol=1e-3)
    assert torch.equal(first["bases"], second["bases"])


def test_a_sharded_student_has_the_same_loss_and_gradients(by_two: list[Found]) -> None:
    alone = gradients(sharded_batch(), shard=False)
    for found in by_two:
        torch.testing.assert_close(found["half"]["loss"], alone["loss"])
        torch.testing.assert_close(found["half"]["grads"], alone["grads"], rtol=1e-4, atol=1e-7)
