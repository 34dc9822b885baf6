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
import torch.nn.functional as F
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
            teacher = _Teacher.of(head(teacher_NM[rows]), weights)
            for student, hidden_NM in enumerate(student_KNM):
                grad_CM = None if grad_KNM is None else grad_KNM[student, rows]
                loss_K[student] += _chunk_loss(
                    head, hidden_NM[rows], teacher, label_N[rows], weights, grad_CM
                )
        ctx.save_for_backward(grad_KNM)
        return loss_K

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (grad_KNM,) = ctx.saved_tensors
        scale_K = grads[0].to(grad_KNM.dtype)
        return None, grad_KNM * scale_K[:, None, None], None, None, None, None


@dataclass(frozen=True)
class _Teacher:
    """The teacher's distribution at the weights' temperature, and Σ p log p of each position."""

    probability_CV: Tensor
    negentropy_C: Tensor

    @classmethod
    def of(cls, logits_CV: Tensor, weights: LossWeights) -> _Teacher | None:
        if weights.kl == 0:
            return None
        logits_CV = logits_CV.float() / weights.temperature
        normalizer_C = logits_CV.logsumexp(-1)
        probability_CV = (logits_CV - normalizer_C[:, None]).exp_()
        negentropy_C = torch.einsum("cv,cv->c", probability_CV, logits_CV) - normalizer_C
        return cls(probability_CV, negentropy_C)


def _chunk_loss(
    head: Head,
    hidden_CM: Tensor,
    teacher: _Teacher | None,
    label_C: Tensor,
    weights: LossWeights,
    grad_CM: Tensor | None,
) -> Tensor:
    """One chunk's summed loss; its gradient with respect to `hidden_CM` goes to `grad_CM`."""
    with torch.set_grad_enabled(grad_CM is not None):
        hidden_CM = hidden_CM.detach().requires_grad_(grad_CM is not None)
        head_CV = head(hidden_CM)
    logits_CV = head_CV.detach().float()
    loss, grad_CV = torch.zeros((), device=logits_CV.device), None
    if teacher is not None:
        tau = weights.temperature
        divergence, grad_CV = _divergence(logits_CV / tau if tau != 1 else logits_CV, teacher)
        loss, grad_CV = weights.kl * tau**2 * divergence, grad_CV.mul_(weights.kl * tau)
    if weights.ce:
        entropy, entropy_grad_CV = _cross_entropy(logits_CV, label_C)
        loss = loss + weights.ce * entropy
        entropy_grad_CV.mul_(weights.ce)
        grad_CV = entropy_grad_CV if grad_CV is None else grad_CV.add_(entropy_grad_CV)
    if grad_CM is not None and grad_CV is not None:
        (grad,) = torch.autograd.grad(head_CV, hidden_CM, grad_CV.to(head_CV.dtype))
        grad_CM.copy_(grad)
    return loss


def _divergence(logits_CV: Tensor, teacher: _Teacher) -> tuple[Tensor, Tensor]:
    """Summed KL(teacher ‖ softmax(logits)) and its gradient with respect to the logits."""
    normalizer_C = logits_CV.logsumexp(-1)
    cross_C = torch.einsum("cv,cv->c", teacher.probability_CV, logits_CV) - normalizer_C
    grad_CV = (logits_CV - normalizer_C[:, None]).exp_().sub_(teacher.probability_CV)
    return (teacher.negentropy_C - cross_C).sum(), grad_CV


def _cross_entropy(logits_CV: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and its gradient with respect to the logits."""
    log_CV = logits_CV.log_softmax(-1)
    loss = -log_CV.gather(1, label_C[:, None]).sum()
    grad_CV = log_CV.exp_()
    return loss, grad_CV.scatter_add_(1, label_C[:, None], -torch.ones_like(grad_CV[:, :1]))


def token_losses(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Every token's cross-entropy in fp32, made from a chunk of logits at a time.  [N]"""
    chunk = max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
    pairs = zip(logits_NV.split(chunk), target_N.split(chunk), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in pairs])
