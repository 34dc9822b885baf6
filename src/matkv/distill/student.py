"""The student: a frozen model whose keys and values pass through learned, truncated bases.

    key' = key P_key        P = encode diag(gate) decode^T, a gate of ones up to the rank

which equals attention on latents, with no more work on queries and outputs. The teacher is the same
model with the projections off, so that the weights exist once.

Shapes: B sequence, K draws of ranks a sequence, X matrices (one for each layer, side and KV head),
T token, N position that counts, M model dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from matkv.bases.gates import Projected
from matkv.data.batch import IGNORED, Batch
from matkv.distill.adapters import Adapters
from matkv.distill.bases import Bases
from matkv.distill.coded import Coding, Recoded
from matkv.distill.losses import LossWeights, chunk_size, distillation_loss
from matkv.errors import UnsupportedModelError
from matkv.hf.handlers import truncating


class Student(nn.Module):
    """Model and bases together; `forward` is the loss of a batch.

    The model must have passed `check_head`. Only bases and adapters learn. The first `sink` tokens
    are exact, and the `recent` ones before a query. With `coding` sizes are levels of it.
    `attending()` must be open during forward and backward passes, because gradient checkpointing
    runs layers again backwards.
    """

    accepts_loss_kwargs = True  # transformers' Trainer then passes `num_items_in_batch`

    def __init__(
        self,
        model: PreTrainedModel,
        bases: Bases,
        weights: LossWeights,
        adapters: Adapters | None = None,
        *,
        recent: int = 0,
        sink: int = 0,
        coding: Coding | None = None,
    ) -> None:
        super().__init__()
        self.model, self.bases, self.weights, self.adapters = model, bases, weights, adapters
        self.coding = coding
        kind = Projected if coding is None else Recoded
        self.projected = {layer: kind(recent, sink) for layer, _ in bases.heads}
        # Every process has loaded the same weights: DDP need not send what does not learn.
        self._ddp_params_and_buffers_to_ignore = [
            *(name for name, parameter in self.named_parameters() if not parameter.requires_grad),
            *(name for name, _ in self.named_buffers()),
        ]

    def train(self, mode: bool = True) -> Student:
        """The model stays in evaluation mode, layers to checkpoint and dropout of adapters not."""
        super().train(mode)
        self.model.eval()
        for name, module in self.model.named_modules():
            if isinstance(module, GradientCheckpointingLayer) or "lora_dropout" in name:
                module.training = mode
        return self

    def attending(self) -> AbstractContextManager[None]:
        """Let the bases take part in the model's attention meanwhile."""
        return truncating(self.model, self.projected)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        sizes: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss of sequences [BT] at ranks `sizes` [BKX], a mean over K and labels that count.

        With `num_items_in_batch` the sum over labels is divided by that number instead of theirs.
        """
        loss_K, count = self.losses(Batch(input_ids, attention_mask, labels), sizes)
        return {"loss": loss_K.mean() / (num_items_in_batch or max(1, count))}

    def losses(self, batch: Batch, sizes_BKX: Tensor) -> tuple[Tensor, int]:
        """Each draw's summed loss [K], and the number of labels that count."""
        assert batch.labels_BT is not None
        K, label_X = sizes_BKX.shape[1], batch.labels_BT[:, 1:].flatten()
        index_N = (label_X != IGNORED).nonzero()[:, 0]
        label_N = label_X[index_N]
        self._project(None)
        with torch.no_grad(), self.adapters.off() if self.adapters else nullcontext():
            (teacher_NM,) = self._hidden(batch, index_N)
        # The K draws form one batch, so that the projections stay the same until the backward pass
        # has run the layers again.
        self._project(sizes_BKX.transpose(0, 1).flatten(0, 1))
        student_KNM = self._hidden(batch, index_N, K)
        vocabulary = self.model.config.get_text_config().vocab_size
        loss_K = distillation_loss(
            self.model.get_output_embeddings(),
            student_KNM,
            teacher_NM,
            label_N,
            self.weights,
            chunk=chunk_size(K, vocabulary),
        )
        return loss_K, len(label_N)

    def _hidden(self, batch: Batch, index_N: Tensor, draws: int = 1) -> Tensor:
        """Last hidden states of the positions whose next token counts.  [KNM]"""
        out = self.model.get_decoder()(**batch.inputs(draws), use_cache=False)
        hidden_KXM = out.last_hidden_state[:, :-1].unflatten(0, (draws, -1)).flatten(1, 2)
        hidden_KNM: Tensor = hidden_KXM.index_select(1, index_N)
        return hidden_KNM

    def _project(self, sizes_BX: Tensor | None) -> None:
        """Put the student's projections in place, or take them out for the teacher."""
        if self.coding is not None:
            self._recode(self.coding, sizes_BX)
            return
        products = None if sizes_BX is None else self.bases(sizes_BX)
        for layer, projected in self.projected.items():
            projected.key = None if products is None else products[layer, "key"]
            projected.value = None if products is None else products[layer, "value"]

    def _recode(self, coding: Coding, levels_BX: Tensor | None) -> None:
        """The same with codes, whose sizes are levels."""
        for projected in self.projected.values():
            projected.sides.clear()  # type: ignore[attr-defined]
        if levels_BX is None:
            return
        levels = levels_BX.split(list(self.bases.heads.values()), dim=1)
        by_place = dict(zip(self.bases.heads, levels, strict=True))
        for place, maps in self.bases.maps().items():
            layer, side = place
            widths_BGD = coding.widths_at(place, by_place[place])
            state = maps, coding.quantizer(place, maps), widths_BGD
            self.projected[layer].sides[side] = state  # type: ignore[attr-defined]


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Make sure that logits are the output embeddings of the last hidden states, and no more.

    Raises:
        UnsupportedModelError: they are not.
    """
    ids_BT = torch.arange(4, device=model.device)[None]
    hidden_BTM = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
    ours_BTV = model.get_output_embeddings()(hidden_BTM)
    if not torch.allclose(ours_BTV, model(ids_BT, use_cache=False).logits, rtol=1e-2, atol=1e-2):
        raise UnsupportedModelError(
            f"{model.config.model_type} scales or caps its logits: distilling it is not supported"
        )
