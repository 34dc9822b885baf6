"""What tests of the search for ranks share: text, settings, and how a table is measured.

Shapes: B batch, T token, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import matkv
from matkv.allocate.config import AllocateConfig
from matkv.allocate.divergence import Text, add_teacher, measure, take_text
from matkv.allocate.fisher import Sensitivity, expand
from matkv.allocate.rounds import gated_projections
from matkv.hf.handlers import truncating
from matkv.ranks import RankTable
from tiny import Tiny, tokens

BATCHES = [tokens(2, 24, seed=seed) for seed in range(4)]


SMALL: dict[str, Any] = {
    "search_tokens": 96,
    "held_out_tokens": 48,
    "expansions": 5,
    "codes": (16,),
}


FISHER = AllocateConfig(**SMALL, budgets=(0.75, 0.5, 0.25))


GREEDY = AllocateConfig(**SMALL, method="greedy", budgets=(0.95, 0.9))


def text_of(subject: Tiny, batches: list[Any] = BATCHES[:2]) -> Text:
    count = sum(
        b.numel() if isinstance(b, Tensor) else int(b["attention_mask"].sum()) for b in batches
    )
    text = take_text(batches, count, subject.model, "test")
    add_teacher(subject.model, text)
    return text


def expanded(subject: Tiny, text: Text, table: RankTable, samples: int = 1) -> Sensitivity:
    gated = gated_projections(subject.model, subject.artifact)
    with truncating(subject.model, gated):
        return expand(subject.model, gated, text, table, samples=samples, seed=1)


@torch.no_grad()
def attached_kl(subject: Tiny, batches: list[Tensor], table: RankTable) -> float:
    """KL by the latent attention of the real thing, in fp64."""
    teacher = [subject.model(ids).logits.double().log_softmax(-1) for ids in batches]
    subject.attach(ranks=table)
    student = [subject.model(ids).logits.double().log_softmax(-1) for ids in batches]
    matkv.detach(subject.model)
    sums = [(p.exp() * (p - q)).sum() for p, q in zip(teacher, student, strict=True)]
    return float(torch.stack(sums).sum()) / sum(ids.numel() for ids in batches)


def measured(subject: Tiny, text: Text, table: RankTable) -> float:
    gated = gated_projections(subject.model, subject.artifact)
    with truncating(subject.model, gated):
        return measure(subject.model, gated, text, table).kl
