"""What tests of distillation share: a text with something to learn, and short settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matkv.artifact.artifact import Artifact
from matkv.bases.maps import Maps
from matkv.distill.config import DistillConfig
from matkv.ranks import SIDES
from tiny import VOCAB


def text(sequences: int = 40, length: int = 16) -> Tensor:
    """Sequences with something to learn: each token is a function of the one before, and noise."""
    source = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(0, VOCAB, (sequences, length), generator=source)
    for position in range(1, length):
        follow_N = torch.rand(sequences, generator=source) < 0.8
        next_N = (ids_NT[:, position - 1] * 7 + 3) % VOCAB
        ids_NT[follow_N, position] = next_N[follow_N]
    return ids_NT


def quick(**changes: Any) -> DistillConfig:
    settings: dict[str, Any] = {
        "objective": "end-to-end",
        "steps": 6,
        "sequence_length": 16,
        "local_steps": 6,
        "local_batch_size": 4,
        "warmup_steps": 2,
        "probe_every": 3,
        "checkpoint_every": 3,
    }
    return DistillConfig.from_dict(settings | changes)


def off_orthogonal(maps: Maps) -> float:
    basis_GDD = maps.encode_XDD
    eye_DD = torch.eye(basis_GDD.shape[-1])
    return float(torch.linalg.matrix_norm(basis_GDD.mT @ basis_GDD - eye_DD).max())


def same_bases(one: Artifact, other: Artifact) -> bool:
    return all(
        torch.equal(one.maps(layer, side).encode_XDD, other.maps(layer, side).encode_XDD)
        for layer in one.geometry.compressed
        for side in SIDES
    )
