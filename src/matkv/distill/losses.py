"""The distillation loss over the vocabulary, in memory that does not grow with the text.

    loss = kl · τ² KL(softmax(teacher/τ) ‖ softmax(student/τ)) + ce · CE(student, label)

Logits exist for one chunk of positions at a time. The gradient with respect to the student's hidden
states is found in the same visit, so that nothing is computed twice.

Shapes: K student forward passes over the same text, N position, C position of a chunk, R of a block
of it, M model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from matkv.errors import TrainingError
from matkv.logits import CHUNK_ELEMENTS, row_blocks
from matkv.settings import NotNegative, Positive, settings

Head = Callable[[Tensor], Tensor]


@settings(TrainingError)
class LossWeights:
    """How much the divergence and the cross-entropy count, and the divergence's temperature."""

    kl: NotNegative = Field(default=1.0, description="weight of the divergence")
    ce: NotNegative = Field(default=0.0, description="weight of the cross-entropy")
    temperature: Positive = Field(default=1.0, description="temperature of the divergence")

    def __post_init__(self) -> None:
        if self.kl + self.ce == 0:
            raise TrainingError(f"kl {self.kl} and ce {self.ce} must be 0 or more, one above 0")


def chunk_size(students: int, vocabulary: int) -> int:
    """How many positions to take at a time."""
    return max(1, CHUNK_ELEMENTS // ((students + 1) * vocabulary))


def distillation_loss(
    head: Head,
    student_KNM: Tensor,
    teacher_NM: Tensor,
    label_N: Tensor,
    weights: LossWeights,
    *,
    chunk: int,
) -> Tensor:
    """Each student's loss, summed over positions; `head` turns hidden into logits.  [K]

    The teacher and the head's own weights get no gradient.
    """
    loss_K: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        head, student_KNM, teacher_NM, label_N, weights, chunk
    )
    return loss_K


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
        chunk: int,
    ) -> Tensor:
        grad_KNM = torch.empty_like(student_KNM) if student_KNM.requires_grad else None
        loss_K = torch.zeros(len(student_KNM), device=student_KNM.device)
        for first in range(0, len(label_N), chunk):
            rows = slice(first, first + chunk)
            teacher_CV = head(teacher_NM[rows]) if weights.kl else None
            for student, hidden_NM in enumerate(student_KNM):
                grad_CM = None if grad_KNM is None else grad_KNM[student, rows]
                loss_K[student] += _chunk_loss(
                    head, hidden_NM[rows], teacher_CV, label_N[rows], weights, grad_CM
                )
        ctx.save_for_backward(grad_KNM)
        return loss_K

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (grad_KNM,) = ctx.saved_tensors
        scale_K = grads[0].to(grad_KNM.dtype)
        return None, grad_KNM * scale_K[:, None, None], None, None, None, None


def _chunk_loss(
    head: Head,
    hidden_CM: Tensor,
    teacher_CV: Tensor | None,
    label_C: Tensor,
    weights: LossWeights,
    grad_CM: Tensor | None,
) -> Tensor:
    """One chunk's summed loss; its gradient with respect to `hidden_CM` goes to `grad_CM`."""
    with torch.set_grad_enabled(grad_CM is not None):
        hidden_CM = hidden_CM.detach().requires_grad_(grad_CM is not None)
        head_CV = head(hidden_CM)
    logits_CV = head_CV.detach()
    loss, grad_CV = torch.zeros((), device=logits_CV.device), torch.empty_like(logits_CV)
    for rows in row_blocks(logits_CV):
        logits_RV = logits_CV[rows].float()
        parts = []
        if teacher_CV is not None:
            parts.append(_divergence(logits_RV, teacher_CV[rows].float(), weights))
        if weights.ce:
            parts.append(_cross_entropy(logits_RV, label_C[rows], weights))
        loss += sum(part for part, _ in parts)
        grad_CV[rows] = sum(grad_RV for _, grad_RV in parts)
    if grad_CM is not None:
        (grad,) = torch.autograd.grad(head_CV, hidden_CM, grad_CV)
        grad_CM.copy_(grad)
    return loss


def _divergence(
    student_RV: Tensor, teacher_RV: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Summed and weighted KL(teacher ‖ student), its gradient with respect to the student."""
    tau = weights.temperature
    log_q_RV, log_p_RV = ((x_RV / tau).log_softmax(-1) for x_RV in (student_RV, teacher_RV))
    kl = F.kl_div(log_q_RV, log_p_RV, reduction="sum", log_target=True)
    grad_RV = log_q_RV.exp_().sub_(log_p_RV.exp_()).mul_(weights.kl * tau)
    return weights.kl * tau**2 * kl, grad_RV


def _cross_entropy(
    logits_RV: Tensor, label_R: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Summed and weighted cross-entropy, and its gradient with respect to the logits."""
    log_RV = logits_RV.log_softmax(-1)
    loss = -log_RV.gather(1, label_R[:, None]).sum()
    grad_RV = log_RV.exp_()
    grad_RV.scatter_add_(1, label_R[:, None], -torch.ones_like(grad_RV[:, :1]))
    return weights.ce * loss, grad_RV.mul_(weights.ce)
