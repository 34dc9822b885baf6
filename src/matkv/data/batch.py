"""What a model is fed: token ids, what of them is padding, the positions that follow, and labels.

Shapes: B sequence, T token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from matkv.errors import DataError

IGNORED = -100  # a label that does not count, as everywhere in transformers


@dataclass(frozen=True)
class Batch:
    """Sequences of token ids; `mask_BT` is 0 at padding, None where there is none.

    `labels_BT` are the ids to predict, `IGNORED` where nothing is to be learned.
    """

    ids_BT: Tensor
    mask_BT: Tensor | None = None
    labels_BT: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tokens) -> Batch:
        """What a caller gives as a batch: itself, or token ids with or without a mask.

        Raises:
            DataError: it is none, or the mask does not fit.
        """
        if isinstance(tokens, Batch):
            return tokens
        fields: Any = tokens if isinstance(tokens, Mapping) else {"input_ids": tokens}
        ids_BT, mask_BT = fields.get("input_ids"), fields.get("attention_mask")
        if not isinstance(ids_BT, Tensor) or ids_BT.dim() != 2 or ids_BT.is_floating_point():
            raise DataError(
                f"a batch is {_described(tokens if ids_BT is None else ids_BT)}: give token ids "
                "[sequences, tokens], or a mapping with input_ids and attention_mask"
            )
        if mask_BT is not None and mask_BT.shape != ids_BT.shape:
            raise DataError(
                f"the attention mask is {_described(mask_BT)}, the token ids are "
                f"{_described(ids_BT)}: give one of the same shape"
            )
        return cls(ids_BT, None if mask_BT is None or bool(mask_BT.all()) else mask_BT)

    @classmethod
    def padded(cls, ids: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> Batch:
        """Sequences [T] side by side, padded on the right where lengths differ."""
        ids_BT = pad_sequence(list(ids), batch_first=True)
        mask_BT = pad_sequence([torch.ones_like(ids_T) for ids_T in ids], batch_first=True)
        return cls(
            ids_BT,
            None if bool(mask_BT.all()) else mask_BT,
            None if labels is None else pad_sequence(list(labels), True, IGNORED),
        )

    @property
    def real(self) -> Tensor:
        """1 at tokens, 0 at padding.  [BT]"""
        return torch.ones_like(self.ids_BT) if self.mask_BT is None else self.mask_BT

    @property
    def tokens(self) -> int:
        """How many there are, padding not counted."""
        return self.ids_BT.numel() if self.mask_BT is None else int(self.mask_BT.sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        moved = (None if x is None else x.to(device) for x in (self.mask_BT, self.labels_BT))
        return Batch(self.ids_BT.to(device), *moved)

    def inputs(self, copies: int = 1) -> dict[str, Tensor]:
        """What the model takes, the sequences `copies` times in a row.

        Positions count tokens, as generation has them: padding must not shift what depends on them.
        """
        inputs = {"input_ids": self.ids_BT.repeat(copies, 1)}
        if self.mask_BT is not None:
            mask_BT = self.mask_BT.repeat(copies, 1)
            inputs["attention_mask"] = mask_BT
            inputs["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp_min(0)
        return inputs


# What callers give as a batch: ids [BT], or a mapping with `input_ids` and `attention_mask`.
Tokens = Tensor | Mapping[str, Tensor] | Batch


def _described(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a tensor {list(given.shape)} of {str(given.dtype).removeprefix('torch.')}"
    return repr(given)[:40]
