"""The distillation loss over the vocabulary, in memory that does not grow with the text.

    loss = kl · τ² KL(softmax(teacher/τ) ‖ softmax(student/τ)) + ce · CE(student, label)

Logits exist for one chunk of positions at a time. The gradient with respect to the student's hidden
states is found in the same visit, so that nothing is computed twice.

Shapes: K student forward passes over the same text, N position, C position of a chunk, M model dim,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matkv.errors import TrainingError

Head = Callable[[Tensor], Tensor]

# Logits of one chunk, student and teacher together, stay under this many elements.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much the divergence and the cross-entropy count, and the divergence's temperature."""

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kl < 0 or self.ce < 0 or self.kl + self.ce == 0:
            raise TrainingError(f"kl {self.kl} and ce {self.ce} must be 0 or more, one above 0")
        if self.temperature <= 0:
            raise TrainingError(f"temperature {self.temperature} must be above 0")


def distillation_loss(
    head: Head,
    student_KNM: Tensor,
    teacher_NM: Tensor,
    label_N: Tensor,
    weights: LossWeights,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Sum of the loss over positions, mean over the K students; `head` turns hidden into logits.

    The head's own weights get no gradient.
    """
    loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        head, student_KNM, teacher_NM, label_N, weights, chunk
    )
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradient of all chunks, forwards; only a scaling is left for backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        student_KNM: Tensor,
        teacher_NM: Tensor,
        label_N: Tensor,
        weights: LossWeights,
        chunk: int | None,
    ) -> Tensor:
        K, N, _ = student_KNM.shape
        grad_KNM = torch.empty_like(student_KNM) if student_KNM.requires_grad else None
        total = torch.zeros((), device=student_KNM.device)
        first = 0
        while first < N:
            teacher_CV = head(teacher_NM[first : first + (chunk or 1)])
            size = chunk or max(1, CHUNK_ELEMENTS // ((K + 1) * teacher_CV.shape[-1]))
            rows = slice(first, first + size)
            if chunk is None:
                teacher_CV = head(teacher_NM[rows])
            loss, grad_KCM = _chunk(head, student_KNM[:, rows], teacher_CV, label_N[rows], weights)
            total += loss
            if grad_KNM is not None:
                grad_KNM[:, rows] = grad_KCM
            first += size
        ctx.save_for_backward(grad_KNM)
        return total / K

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (grad_KNM,) = ctx.saved_tensors
        return None, grad_KNM * (grads[0] / grad_KNM.shape[0]), None, None, None, None
