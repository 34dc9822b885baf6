"""The chunked loss has the value and the gradient of its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matkv.distill.losses import LossWeights, chunk_size, distillation_loss
from tiny import seeded


def some_head() -> nn.Linear:
    with seeded(0):
        return nn.Linear(8, 30).requires_grad_(False)


def some_states(*sizes: int, seed: int = 0) -> Tensor:
    """Hidden states of width 8."""
    return torch.randn(*sizes, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "weights",
    [
        LossWeights(),
        LossWeights(kl=0.25, ce=0.75),
        LossWeights(temperature=2.0),
        LossWeights(kl=0.0, ce=1.0),
        LossWeights(kl=1.0, ce=0.5, temperature=0.5),
    ],
    ids=str,
)
def test_chunks_give_the_loss_and_gradient_of_the_formula(weights: LossWeights) -> None:
    head = some_head()
    hidden_KNM = some_states(2, 11).requires_grad_()
    teacher_NM = some_states(11, seed=1)
    label_N = torch.randint(0, 30, (11,), generator=torch.Generator().manual_seed(2))
    tau = weights.temperature
    teacher_NV = head(teacher_NM).div(tau).log_softmax(-1)
    expected = []
    for hidden_NM in hidden_KNM:
        student_NV = head(hidden_NM)
        kl = F.kl_div(
            (student_NV / tau).log_softmax(-1), teacher_NV, reduction="sum", log_target=True
        )
        ce = F.cross_entropy(student_NV, label_N, reduction="sum")
        expected.append(weights.kl * tau**2 * kl + weights.ce * ce)
    (wanted,) = torch.autograd.grad(expected[0] + 3 * expected[1], hidden_KNM)
    for chunk in (1, 4, 100):
        loss_K = distillation_loss(head, hidden_KNM, teacher_NM, label_N, weights, chunk=chunk)
        torch.testing.assert_close(loss_K, torch.stack(expected), rtol=1e-4, atol=1e-4)
        (grad,) = torch.autograd.grad(loss_K[0] + 3 * loss_K[1], hidden_KNM)
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_a_student_like_its_teacher_has_no_divergence() -> None:
    hidden_NM = some_states(5)
    loss_K = distillation_loss(
        some_head(), hidden_NM[None], hidden_NM, torch.zeros(5).long(), LossWeights(), chunk=2
    )
    assert abs(float(loss_K)) < 1e-5


def test_the_heads_weights_get_no_gradient_but_the_student_does() -> None:
    head = some_head().requires_grad_(True)
    teacher_NM = some_states(5, seed=1).requires_grad_()
    hidden_KNM = some_states(1, 5).requires_grad_()
    label_N = torch.zeros(5).long()
    distillation_loss(
        head, hidden_KNM, teacher_NM, label_N, LossWeights(), chunk=2
    ).sum().backward()
    assert head.weight.grad is None and teacher_NM.grad is None
    assert hidden_KNM.grad is not None and float(hidden_KNM.grad.abs().max()) > 0


def test_larger_vocabularies_and_more_students_take_smaller_chunks() -> None:
    assert chunk_size(1, 1 << 10) == 1 << 13
    assert chunk_size(3, 1 << 10) == 1 << 12
    assert chunk_size(1, 1 << 30) == 1
