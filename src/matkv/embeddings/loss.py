"""The loss over a ladder of sizes (Starbucks, arXiv 2410.13230), around any base loss.

Shapes: B text, D dimension, X all embeddings of a pass side by side, M candidate of the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args
from zlib import crc32

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import (
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
    pairwise_cos_sim,
    pairwise_dot_score,
    pairwise_euclidean_sim,
    pairwise_manhattan_sim,
)
from torch import Tensor, nn
from torch.nn import functional as F

from matkv.embeddings.depth import backbone_of, recording
from matkv.embeddings.layers import LayerEmbeddings
from matkv.embeddings.rungs import Size, check, covered, dimensions, name
from matkv.embeddings.serve import record
from matkv.errors import TrainingError
from matkv.schedule import Schedule

Over = Literal["candidates", "coordinates"]
SEAM = "compute_loss_from_embeddings"
Similarity = Callable[[Tensor, Tensor], Tensor]
# Of a loss that compares pairs, what compares every first with every second.
MATRIX: dict[Similarity, Similarity] = {
    pairwise_cos_sim: cos_sim,
    pairwise_dot_score: dot_score,
    pairwise_euclidean_sim: euclidean_sim,
    pairwise_manhattan_sim: manhattan_sim,
}


class LadderLoss(nn.Module):
    """The mean of `loss` over the sizes that `schedule` draws, from one forward pass a column.

    L = Σ_(n,d) a(n,d) [ l(u(n,d)) + w KL(n,d) ]

    over the sizes drawn; u(n,d), the first d dimensions after layer n, is exactly what
    `truncate(model, n, d)` serves, a final norm included. The a(n,d) are equal and sum to 1; the
    full size may count `full_weight` times as much as another. `balanced` divides the gradient of
    every l by l, and multiplies it by their mean: that of Σ a log l up to a factor. The smallest
    sizes, whose losses are the largest, then no longer crowd out the full one. `distill` is w; the
    full size teaches, without a gradient, all the others drawn:

        over candidates     KL( softmax s(full) || softmax s(n,d) ), s the base loss's own scaled
                            similarities of a text to all candidates of its batch (section 3.2,
                            retrieval)
        over coordinates    KL( softmax v(full)[:d] || softmax v(n,d) ), v the embeddings before
                            they are normalized (section 3.2, STS, with w 0.3)

    It gives a dict, `{"1x32": …, "2x64": …, "distill": …}`, whose sum is L: the Trainer of
    sentence-transformers adds the parts and logs each. The sizes are recorded in the model's config
    once they are trained. `step` counts the passes with gradients; the same seed and step draw the
    same sizes, so a resumed training sets it.

    Raises:
        TrainingError: the base loss cannot be computed from embeddings, or the schedule does not
            fit the model or `distill`.
        UnsupportedModelError: the model has no layers to cut.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module,
        schedule: Schedule,
        *,
        distill: float = 0.0,
        distill_over: Over = "candidates",
        full_weight: float = 1.0,
        balanced: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_loss(loss, model)
        self.backbone = backbone_of(model)
        self.full: Size = (self.backbone.layers, dimensions(model))
        _check_schedule(schedule, self.full)
        self.model, self.loss, self.schedule = model, loss, schedule
        self.distill, self.distill_over = distill, distill_over
        self.full_weight, self.balanced, self.seed = full_weight, balanced, seed
        self.step = 0
        # The Trainer may wrap `model`; its modules and its config stay these.
        self._bare = (model,)
        self._check_weights()

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None
    ) -> dict[str, Tensor]:
        """The parts of L for a batch: one column of features for every text of an example."""
        drawn = self.draw(self.step)
        if torch.is_grad_enabled():
            if self.step == 0:
                record(self._bare[0], covered(self.schedule), self.full)
            self.step += 1
        columns, plain = self._embed(list(sentence_features), list(drawn))
        shares = self._shares(drawn)
        values = {
            size: self._base(embeddings, labels) * shares[size]
            for size, embeddings in columns.items()
        }
        if self.balanced:
            values = _balanced(values, shares)
        parts = {name(size): value for size, value in values.items()}
        if self.distill:
            states = columns if self.distill_over == "candidates" else plain
            parts["distill"] = self.distill * self._divergence(states, shares)
        return parts

    def _shares(self, drawn: Counter[Size]) -> dict[Size, float]:
        """What part of the loss each size is: as often as it was drawn, the full one weighted."""
        weights = {
            size: count * (self.full_weight if size == self.full else 1.0)
            for size, count in drawn.items()
        }
        return {size: weight / sum(weights.values()) for size, weight in weights.items()}

    def draw(self, step: int) -> Counter[Size]:
        """The sizes of a step, and how often each was drawn."""
        # A step's own generator: what it draws must not depend on where a training was resumed.
        # Hashed, as a generator reads but 32 bits of a seed.
        generator = torch.Generator().manual_seed(crc32(f"{self.seed}, {step}".encode()))
        return Counter((layer, dim) for layer, dim in self.schedule.draw(step, generator))

    def _embed(
        self, features: list[dict[str, Any]], sizes: list[Size]
    ) -> tuple[dict[Size, list[Tensor]], dict[Size, list[Tensor]]]:
        """The embeddings of every column by size, as served and before they are normalized."""
        model, layers = self._bare[0], [layer for layer, _ in sizes]
        served = LayerEmbeddings(model, self.backbone, layers)
        heads = [served]
        if self.distill and self.distill_over == "coordinates":
            heads.append(LayerEmbeddings(model, self.backbone, layers, normalized=False))

        def embed(column: dict[str, Any]) -> dict[str, Any]:
            out = self.model(column)
            wide = [head(out)["sentence_embedding"] for head in heads]
            return {"sentence_embedding": torch.cat(wide, dim=-1)}

        with recording(self.backbone, layers):
            wide = embed_columns(embed, features)
        by_head: list[dict[Size, list[Tensor]]] = []
        for index, head in enumerate(heads):
            splits = [head.split(x_BX.tensor_split(len(heads), -1)[index], sizes) for x_BX in wide]
            by_head.append({size: [split[size] for split in splits] for size in sizes})
        return by_head[0], by_head[-1]

    def _base(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        value = getattr(self.loss, SEAM)(columns, labels)
        if isinstance(value, dict):  # a base loss of several parts
            value = torch.stack(list(value.values())).sum()
        assert isinstance(value, Tensor)
        return value

    def _divergence(self, states: dict[Size, list[Tensor]], shares: dict[Size, float]) -> Tensor:
        """The divergences of the smaller sizes from the full one, each by its part of the loss."""
        if self.full not in states:
            raise TrainingError(_untaught(self.full))
        total = states[self.full][0].new_zeros(())
        for size, columns in states.items():
            if size == self.full:
                continue
            if self.distill_over == "candidates":
                pairs = [(self._scores(states[self.full]), self._scores(columns))]
            else:
                whole = [v_BD[:, : size[1]] for v_BD in states[self.full]]
                pairs = list(zip(whole, columns, strict=True))
            for teacher_BM, student_BM in pairs:
                total = total + shares[size] * _kl(teacher_BM, student_BM) / len(pairs)
        return total

    def _scores(self, columns: list[Tensor]) -> Tensor:
        """Similarities of first texts to all others of the batch, as the base loss has them."""
        if len(columns) < 2:
            raise TrainingError("distill over candidates needs at least two texts an example")
        base: Any = self.loss
        compare = MATRIX.get(base.similarity_fct, base.similarity_fct)
        scores_BM: Tensor = compare(columns[0], torch.cat(columns[1:]))
        return scores_BM * float(base.scale)

    def _check_weights(self) -> None:
        if not self.full_weight > 0:
            raise TrainingError(f"full_weight {self.full_weight} must be above 0")
        if not self.distill >= 0:
            raise TrainingError(f"distill {self.distill} must be 0 or more")
        if self.distill_over not in get_args(Over):
            allowed = ", ".join(get_args(Over))
            raise TrainingError(f"distill_over {self.distill_over!r} must be one of {allowed}")
        if not self.distill:
            return
        if self.full not in self.draw(0):
            raise TrainingError(_untaught(self.full))
        has = callable(getattr(self.loss, "similarity_fct", None)) and hasattr(self.loss, "scale")
        if self.distill_over == "candidates" and not has:
            raise TrainingError(
                f"{type(self.loss).__name__} has no scale and similarity to distill over "
                "candidates with: distill over coordinates, or leave distill at 0"
            )

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {
            "loss": type(self.loss).__name__,
            "schedule": self.schedule.to_json(),
            "distill": self.distill,
            "distill_over": self.distill_over,
            "full_weight": self.full_weight,
            "balanced": self.balanced,
            "seed": self.seed,
        }

    @property
    def citation(self) -> str:
        """The paper, for the model card."""
        return CITATION


CITATION = """
@misc{zhuang2024starbucks,
    title={Starbucks: Improved Training for 2D Matryoshka Embeddings},
    author={Shengyao Zhuang and Shuai Wang and Bevan Koopman and Guido Zuccon},
    year={2024},
    eprint={2410.13230},
    archivePrefix={arXiv}
}
"""


def _check_loss(loss: nn.Module, model: SentenceTransformer) -> None:
    if not callable(getattr(loss, SEAM, None)):
        raise TrainingError(
            f"{type(loss).__name__} cannot be computed from embeddings (it has no {SEAM}): take "
            "MultipleNegativesRankingLoss, CoSENTLoss or another loss that has it"
        )
    if getattr(loss, "model", model) is not model:
        raise TrainingError(
            f"{type(loss).__name__} was made for another model: make it for this one"
        )


def _check_schedule(schedule: Schedule, full: Size) -> None:
    sizes = tuple(axis.size for axis in schedule.axes)
    if sizes != full:
        shown = "x".join(map(str, sizes))
        raise TrainingError(
            f"the schedule is over {shown}, the model has {name(full)} (layers x dimensions): make "
            "it with ladder(model), or over Axis('layer', …, 1) and Axis('dim', …, …)"
        )
    layer, dim = schedule.smallest
    check([(layer, dim)], full)


def _balanced(values: dict[Size, Tensor], shares: dict[Size, float]) -> dict[Size, Tensor]:
    """The same values; their gradients as large for each other as their shares.

    Of a loss that is zero, nothing is left to balance.
    """
    total = torch.stack(list(values.values())).sum().detach()
    balanced = {}
    for size, value in values.items():
        now = value.detach()
        factor = torch.where(now > 0, shares[size] * total / now, torch.ones_like(now))
        # Only the gradient is scaled: what is logged stays the loss.
        balanced[size] = now + factor * (value - now)
    return balanced


def _kl(teacher_BM: Tensor, student_BM: Tensor) -> Tensor:
    """KL(softmax teacher || softmax student), mean over texts; none reaches the teacher."""
    return F.kl_div(
        F.log_softmax(student_BM, dim=-1),
        F.softmax(teacher_BM.detach(), dim=-1),
        reduction="batchmean",
    )


def _untaught(full: Size) -> str:
    return (
        f"distill needs the full size {name(full)} in every step, to teach the others: add it to a "
        "ladder or take a sandwich"
    )
