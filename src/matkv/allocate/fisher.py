"""What dropping columns would cost, for all layers, heads and columns at once.

Every column has a gate. Around the ranks a model runs at now, closing a set S of open gates changes
the KL from the teacher, in nats a token, by about

    - Σ_S slope  +  ½ E[(Σ_S score)²]

slope   gradient of the KL by each gate: zero where student and teacher agree, as at full rank
score   gradient by each gate of the log-likelihood of one sequence whose labels are drawn from the
        model's own distribution; the expected square is the Fisher information of the gates

Scores of columns that go together are added before they are squared, so interactions inside a set
count. One backward pass gives each for every gate.

Shapes: B batch, N sequence, S sample, T token, V vocabulary, G KV head, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matkv.allocate.descent import Descent, descend
from matkv.allocate.divergence import Gated, Piece, Text, reduced, set_gates
from matkv.allocate.space import Levels, Space, Unit
from matkv.logits import row_blocks
from matkv.ranks import SIDES, RankTable, Side


@dataclass(frozen=True)
class Sensitivity:
    """Expansion of the KL around one rank table, in nats a token.

    `slope[layer, side]` is [GD]; `score[layer, side]` is [NGD], scaled so that half of its summed
    squares over N is the second-order term; `kl` is the KL at the table itself.
    """

    slope: dict[tuple[int, Side], Tensor]
    score: dict[tuple[int, Side], Tensor]
    kl: float

    def costs(self, space: Space, levels: Levels) -> list[list[float]]:
        """Cost of lowering every unit by 0, 1, 2, ... levels from `levels`."""
        return [self._unit(unit, level) for unit, level in zip(space.units, levels, strict=True)]

    def _unit(self, unit: Unit, level: int) -> list[float]:
        slope_D = torch.stack([self.slope[layer, side][g] for layer, side, g in unit.cells]).sum(0)
        score_CND = torch.stack([self.score[layer, side][:, g] for layer, side, g in unit.cells])
        ranks = list(unit.ladder[level:])
        slope_R, score_NR = _dropped(slope_D, ranks), _dropped(score_CND.sum(0), ranks)
        costs: list[float] = (0.5 * score_NR.square().sum(0) - slope_R).tolist()
        return costs


def averaged(recent: Sequence[Sensitivity], fading: float) -> Sensitivity:
    """Mean of several expansions, each weighing `fading` times what the next one does."""
    weights = [fading**age for age in reversed(range(len(recent)))]
    weighed = [(past, weight / sum(weights)) for past, weight in zip(recent, weights, strict=True)]
    slope, score = {}, {}
    for name in recent[-1].slope:
        slope[name] = torch.stack([past.slope[name] * share for past, share in weighed]).sum(0)
        score[name] = torch.cat([past.score[name] * share**0.5 for past, share in weighed])
    return Sensitivity(slope, score, recent[-1].kl)


def _dropped(x: Tensor, ranks: list[int]) -> Tensor:
    """Sums over the columns from each rank up to the first, for all `ranks`.  [...D -> ...R]"""
    summed = torch.cat((torch.zeros_like(x[..., :1]), x.cumsum(-1)), dim=-1)
    return summed[..., ranks[:1]] - summed[..., ranks]


def expand(
    model: PreTrainedModel,
    gated: Gated,
    text: Text,
    table: RankTable,
    *,
    samples: int,
    seed: int,
) -> Sensitivity:
    """Expand the KL around `table`, by all processes together.

    `samples` label sequences are drawn for every sequence of the text.
    """
    N, device = text.sequences, model.device
    kl_N = torch.zeros(N, dtype=torch.float64, device=device)
    grads = {
        (layer, side): torch.zeros(N, samples + 1, *gate.shape[-2:], device=device)
        for layer, projection in gated.items()
        for side, gate in projection.gates.items()
    }
    with frozen(model):
        for piece in text.mine:
            gates = _open(gated, table, len(piece.batch.ids_BT))
            kl_N[piece.rows] = _differentiate(model, gates, piece, samples, seed, grads)
    slope, score = {}, {}
    for name, grad_NSGD in grads.items():
        grad_NSGD = reduced(grad_NSGD).cpu()
        slope[name] = grad_NSGD[:, 0].sum(0) / text.tokens
        score[name] = grad_NSGD[:, 1:].flatten(0, 1) * (samples * text.tokens) ** -0.5
    return Sensitivity(slope, score, float(reduced(kl_N).sum()) / text.tokens)


def _differentiate(
    model: PreTrainedModel,
    gates: dict[tuple[int, Side], Tensor],
    piece: Piece,
    samples: int,
    seed: int,
    grads: dict[tuple[int, Side], Tensor],
) -> Tensor:
    """Write the gradients of one batch by its gates into `grads` [NSGD]; returns its KL.  [B]

    At S = 0 stands the gradient of the KL, then that of each sampled log-likelihood.
    """
    logits_BTV = model(**piece.batch.inputs(), use_cache=False).logits
    fixed_BTV = logits_BTV.detach()
    kl_B, toward_BTV = _toward_teacher(fixed_BTV, piece)
    for sample in range(samples + 1):
        if sample:
            generator = torch.Generator(fixed_BTV.device)
            generator.manual_seed(seed + piece.first * samples + sample)
            toward_BTV = toward_samples(fixed_BTV, piece, generator)
        grads_BGD = torch.autograd.grad(
            logits_BTV, list(gates.values()), toward_BTV, retain_graph=sample < samples
        )
        for name, grad_BGD in zip(gates, grads_BGD, strict=True):
            grads[name][piece.rows, sample] = grad_BGD.float()
    return kl_B


def _toward_teacher(logits_BTV: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """Summed KL of every sequence, and its gradient by the student's logits.  [B], [BTV]"""
    assert piece.teacher_BTV is not None
    toward_BTV, real_BT, kl_B = torch.empty_like(logits_BTV), piece.batch.real, []
    for row, (student_TV, teacher_TV) in enumerate(zip(logits_BTV, piece.teacher_BTV, strict=True)):
        kl = torch.zeros((), dtype=torch.float64, device=logits_BTV.device)
        for rows in row_blocks(student_TV):
            mask_R1 = real_BT[row, rows, None]
            log_q_RV = student_TV[rows].float().log_softmax(-1)
            log_p_RV = teacher_TV[rows].float().log_softmax(-1)
            p_RV = log_p_RV.exp()
            kl += ((log_p_RV - log_q_RV) * p_RV * mask_R1).sum(dtype=torch.float64)
            toward_BTV[row, rows] = log_q_RV.exp_().sub_(p_RV).mul_(mask_R1).to(toward_BTV.dtype)
        kl_B.append(kl)
    return torch.stack(kl_B), toward_BTV


def toward_samples(logits_BTV: Tensor, piece: Piece, generator: torch.Generator) -> Tensor:
    """Gradient of the log-likelihood of labels drawn from the logits, by the logits."""
    toward_BTV, real_BT = torch.empty_like(logits_BTV), piece.batch.real
    for row, logits_TV in enumerate(logits_BTV):
        height_T1 = torch.rand(len(logits_TV), 1, generator=generator, device=logits_TV.device)
        for rows in row_blocks(logits_TV):
            probability_RV = logits_TV[rows].float().softmax(-1)
            summed_RV = probability_RV.cumsum(-1)
            labels_R1 = torch.searchsorted(summed_RV, height_T1[rows] * summed_RV[:, -1:])
            labels_R1 = labels_R1.clamp_max(summed_RV.shape[-1] - 1)
            one_R1 = torch.ones_like(labels_R1, dtype=probability_RV.dtype)
            residual_RV = probability_RV.neg_().scatter_add_(-1, labels_R1, one_R1)
            residual_RV.mul_(real_BT[row, rows, None])
            toward_BTV[row, rows] = residual_RV.to(toward_BTV.dtype)
    return toward_BTV


def _open(gated: Gated, table: RankTable, batch: int) -> dict[tuple[int, Side], Tensor]:
    """Give every sequence gates of its own at `table`, with gradients."""
    set_gates(gated, table)
    gates: dict[tuple[int, Side], Tensor] = {}
    for layer, projection in gated.items():
        for side in SIDES:
            gate_BGD = projection.gates[side].expand(batch, -1, -1).clone().requires_grad_()
            projection.gates[side] = gates[layer, side] = gate_BGD
    return gates


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradients for weights meanwhile."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


# `expansions` counts the rounds of a fisher search from full rank to this budget.
LOWEST = 0.125
# How much faster than the average one unit may shrink in a fisher round.
REACH = 4
# A round averages the expansions of so many rounds, each weighing this much of the next one.
MEMORY, FADING = 4, 0.5


def fisher_drops(path: Descent, recent: Sequence[Sensitivity], *, expansions: int) -> list[int]:
    """The cheapest drops to the next mark, by expansions of the KL where the path stands.

    One expansion at full rank would not do: the error of a drop grows with those of all the others,
    which the slopes see only where those have been taken. `recent` holds the expansions of the last
    rounds, this one last; averaging over them halves what noise spoils at small budgets. The marks
    are equal relative steps, because what is left matters more the less is left.
    """
    now = path.table().budget
    mark = max(now * LOWEST ** (1 / expansions), path.space.smallest)
    costs = averaged(recent, FADING).costs(path.space, path.levels())
    return descend(path, costs, mark, reach=REACH * (now - mark))
