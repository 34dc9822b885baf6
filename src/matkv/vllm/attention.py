"""Attention of one step of a server, whose sequences are in pages.

Shapes: B sequence, X page of a sequence, N token of a page, T token of the step, L token of a
sequence, G KV head, H query head, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from matkv.attention.latent import attend
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection, joined
from matkv.vllm.pages import Pages


@dataclass(frozen=True)
class Span:
    """A sequence with several new tokens: its place in the batch, the new tokens, and all."""

    sequence: int
    tokens: slice
    length: int


@dataclass(frozen=True)
class Step:
    """What is computed in one step: of every sequence its pages and its tokens, new ones counted.

    `ones` are the sequences with one new token, whose places among the step's tokens are
    `queries`; `spans` are the others.
    """

    pages_BX: Tensor
    slots_T: Tensor
    lengths_B: Tensor
    ones: Tensor
    queries: Tensor
    longest: int
    spans: tuple[Span, ...]

    @classmethod
    def of(
        cls,
        pages_BX: Tensor,
        slots_T: Tensor,
        lengths_B: Tensor,
        starts: list[int],
        ends: list[int],
    ) -> Step:
        """Of where every sequence's new tokens start, and the last one's end; and of its `ends`.

        These are all of its tokens; of a sequence with but one new token they may be more.
        """
        counts = [after - before for before, after in pairwise(starts)]
        single = [index for index, count in enumerate(counts) if count == 1]
        device = pages_BX.device
        return cls(
            pages_BX=pages_BX,
            slots_T=slots_T,
            lengths_B=lengths_B,
            ones=torch.tensor(single, dtype=torch.long, device=device),
            queries=torch.tensor([starts[i] for i in single], dtype=torch.long, device=device),
            longest=max((ends[i] for i in single), default=0),
            spans=tuple(
                Span(index, slice(starts[index], starts[index + 1]), ends[index])
                for index, count in enumerate(counts)
                if count > 1
            ),
        )

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.slots_T)


def attend_step(
    pages: Pages,
    projection: LayerProjection,
    step: Step,
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    *,
    scaling: float,
) -> Tensor:
    """Put the new tokens into their pages, and let them read all up to themselves.  [THD]"""
    states_BGTF = joined(key_TGD, value_TGD).transpose(0, 1)[None]
    pages.write(projection.encode_states(states_BGTF), step.slots_T)
    out_THD = torch.empty_like(query_THD)
    if len(step.ones):
        out_THD[step.queries] = _decode(pages, projection, step, query_THD, scaling)
    for span in step.spans:
        needed = -(-span.length // pages.tokens)
        rows = pages.read(step.pages_BX[span.sequence, None, :needed])
        latents = Latents(projection, [one[:, :, : span.length] for one in rows])
        query_BHQD = query_THD[span.tokens].transpose(0, 1)[None]
        out_BHQD = attend(latents, query_BHQD, None, scaling=scaling)
        out_THD[span.tokens] = out_BHQD[0].transpose(0, 1)
    return out_THD


def _decode(
    pages: Pages, projection: LayerProjection, step: Step, query_THD: Tensor, scaling: float
) -> Tensor:
    """The sequences with one new token, all at once.  [BHD]"""
    needed = -(-step.longest // pages.tokens)
    rows = pages.read(step.pages_BX[step.ones, :needed])
    length_B = step.lengths_B[step.ones]
    is_token_BL = torch.arange(rows[0].shape[2], device=length_B.device) < length_B[:, None]
    mask = None
    if not bool(is_token_BL.all()):
        mask = is_token_BL[:, None, None]
        for one in rows:  # whatever is in pages of others: not a number, perhaps
            one.masked_fill_(~is_token_BL[:, None, :, None], 0)
    query_BHQD = query_THD[step.queries][:, :, None]
    return attend(Latents(projection, rows), query_BHQD, mask, scaling=scaling)[:, :, 0]
