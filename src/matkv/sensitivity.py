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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matkv.divergence import Gated, Piece, Text, reduced, set_gates
from matkv.ranks import SIDES, RankTable, Side
from matkv.search import Levels, Space, Unit


@dataclass(frozen=True)
class Sensitivity:
    """Expansion of the KL around one rank table, in nats a token.

    `slope[layer, side]` is [GD]; `score[layer, side]` is [NGD], scaled so that half of its summed
    squares over N is the second-order term.
    """

    slope: dict[tuple[int, Side], Tensor]
    score: dict[tuple[int, Side], Tensor]

    def costs(self, space: Space, levels: Levels) -> list[list[float]]:
        """Cost of lowering every unit by 0, 1, 2, ... levels from `levels`."""
        return [self._unit(unit, level) for unit, level in zip(space.units, levels, strict=True)]

    def _unit(self, unit: Unit, level: int) -> list[float]:
        slope_D = sum(self.slope[layer, side][head] for layer, side, head in unit.cells)
        score_ND = sum(self.score[layer, side][:, head] for layer, side, head in unit.cells)
        assert isinstance(slope_D, Tensor) and isinstance(score_ND, Tensor)
        top = unit.ladder[level]
        costs = []
        for rank in unit.ladder[level:]:
            second = 0.5 * score_ND[:, rank:top].sum(-1).square().sum()
            costs.append(float(second - slope_D[rank:top].sum()))
        return costs


def expand(
    model: PreTrainedModel,
    gated: Gated,
    text: Text,
    table: RankTable,
    *,
    samples: int,
    generator: torch.Generator,
) -> Sensitivity:
    """Expand the KL around `table`, by all processes together.

    `samples` label sequences are drawn for every sequence of the text.
    """
    set_gates(gated, table)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    sums: dict[tuple[int, Side], Tensor] = {}
    for layer, projection in gated.items():
        for side in SIDES:
            G, D = projection.key_maps.encode_GDD.shape[:2]
            sums[layer, side] = torch.zeros(text.sequences, 1 + samples, G, D, device=model.device)
    with _frozen(model):
        for piece in text.mine:
            for part, grads in enumerate(_gradients(model, gated, piece, samples, seed)):
                for name, grad_BGD in grads.items():
                    sums[name][piece.rows, part] = grad_BGD
    slope, score = {}, {}
    for name, sum_NSGD in sums.items():
        sum_NSGD = reduced(sum_NSGD).cpu()
        slope[name] = sum_NSGD[:, 0].sum(0) / text.tokens
        score[name] = sum_NSGD[:, 1:].flatten(0, 1) * (samples * text.tokens) ** -0.5
    return Sensitivity(slope, score)


def _gradients(
    model: PreTrainedModel, gated: Gated, piece: Piece, samples: int, seed: int
) -> Iterator[dict[tuple[int, Side], Tensor]]:
    """By every gate and sequence: the gradient of the KL, then of each sampled log-likelihood."""
    gates = _open(gated, piece.ids_BT.shape[0])
    logits_BTV = model(**piece.inputs(), use_cache=False).logits
    mask_BT1 = piece.mask_BT[..., None]
    assert piece.teacher_BTV is not None
    with torch.no_grad():
        student_BTV = logits_BTV.float().softmax(-1)
        toward_BTV = (student_BTV - piece.teacher_BTV.float().softmax(-1)) * mask_BT1
    for sample in range(samples + 1):
        if sample:
            generator = torch.Generator(student_BTV.device)
            generator.manual_seed(seed + piece.first * samples + sample)
            labels_BT1 = _draw(student_BTV, generator)
            toward_BTV = -student_BTV * mask_BT1
            toward_BTV.scatter_add_(-1, labels_BT1, mask_BT1.to(toward_BTV.dtype))
        grads = torch.autograd.grad(
            logits_BTV,
            list(gates.values()),
            toward_BTV.to(logits_BTV.dtype),
            retain_graph=sample < samples,
        )
        yield {name: grad.float() for name, grad in zip(gates, grads, strict=True)}


def _draw(probability_BTV: Tensor, generator: torch.Generator) -> Tensor:
    """One label a token.  [BTV -> BT1]"""
    flat = probability_BTV.flatten(0, 1)
    return torch.multinomial(flat, 1, generator=generator).view(*probability_BTV.shape[:2], 1)


def _open(gated: Gated, batch: int) -> dict[tuple[int, Side], Tensor]:
    """Give every sequence gates of its own, with gradients."""
    gates: dict[tuple[int, Side], Tensor] = {}
    for layer, projection in gated.items():
        for side in SIDES:
            gate = getattr(projection, f"{side}_gate")
            gate_BGD = gate[-gate.shape[-2] :] if gate.dim() == 2 else gate[0]
            gate_BGD = gate_BGD.detach().expand(batch, -1, -1).clone().requires_grad_()
            setattr(projection, f"{side}_gate", gate_BGD)
            gates[layer, side] = gate_BGD
    return gates


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
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
