"""Attention of one step of a server, whose sequences are in pages.

Shapes: B sequence, X page of a sequence, N token of a page, T token of the step, L token of a
sequence, G KV head, H query head, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from matkv.attention.kernels import native
from matkv.attention.latent import attend, attend_paged, attend_part_of
from matkv.attention.masks import additive
from matkv.attention.parts import merge
from matkv.latents import compiled
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection, joined
from matkv.vllm.exact import ExactRows
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


@dataclass(frozen=True)
class Near:
    """The exact tokens of a layer, and where those of the step are."""

    rows: ExactRows
    step: Step


def attend_step(
    pages: Pages,
    projection: LayerProjection,
    step: Step,
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    *,
    scaling: float,
    near: Near | None = None,
) -> Tensor:
    """Put the new tokens into their pages, and let them read all up to themselves.  [THD]"""
    states_TGF = joined(key_TGD, value_TGD)
    pages.write(projection.encode_states(states_TGF.transpose(0, 1)[None]), step.slots_T)
    if near is not None:
        near.rows.write(states_TGF, near.step.slots_T)
    out_THD = torch.empty_like(query_THD)
    if len(step.ones):
        out_THD[step.queries] = _decode(pages, projection, step, query_THD, scaling, near)
    for span in step.spans:
        seen, exact = slice(0, span.length), None
        if near is not None:
            seen = near.rows.far(span.length)
            own_X = near.step.pages_BX[span.sequence]
            exact = near.rows.span(states_TGF[span.tokens], own_X, span.length)
        needed = -(-span.length // pages.tokens)
        rows = pages.read(step.pages_BX[span.sequence, None, :needed])
        latents = Latents(projection, [one[:, :, seen] for one in rows], exact)
        query_BHQD = query_THD[span.tokens].transpose(0, 1)[None]
        out_BHQD = attend(latents, query_BHQD, None, scaling=scaling)
        out_THD[span.tokens] = out_BHQD[0].transpose(0, 1)
    return out_THD


def _decode(
    pages: Pages,
    projection: LayerProjection,
    step: Step,
    query_THD: Tensor,
    scaling: float,
    near: Near | None,
) -> Tensor:
    """The sequences with one new token, all at once.  [BHD]"""
    query_BHQD = query_THD[step.queries][:, :, None]
    length_B = step.lengths_B[step.ones].long()
    far = _decode_compiled if _has_kernel(query_THD) else _decode_gathered
    if near is None:
        return far(pages, projection, step, query_BHQD, length_B, 0, scaling)[0][:, :, 0]
    rows = near.rows
    far_BHQD, lse_far_BHQ = far(
        pages, projection, step, query_BHQD, length_B - rows.reach, rows.sink, scaling
    )
    near_BHQD, lse_near_BHQ = rows.near(
        query_BHQD, near.step.pages_BX[near.step.ones], length_B, scaling
    )
    return merge(far_BHQD, lse_far_BHQ, near_BHQD, lse_near_BHQ)[:, :, 0]


def _has_kernel(query: Tensor) -> bool:
    """Whether the compiled kernel reads pages here; without it they are gathered."""
    return query.device.type == "cpu" and compiled.kernel() is not None


def _decode_compiled(
    pages: Pages,
    projection: LayerProjection,
    step: Step,
    query_BHQD: Tensor,
    end_B: Tensor,
    first: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens from `first` to `end_B`, read where they are.  [BHQD, BHQ]"""
    in_pages = native.Paged(
        pages.numbers_KNP,
        pages.codes_KNY,
        step.pages_BX[step.ones].int(),
        end_B.clamp_min(0).int(),
    )
    mask = None
    if first:
        is_seen_L = torch.arange(step.longest) >= first
        mask = additive(is_seen_L[None, None, None], pages.numbers_KNP.dtype)
    return attend_paged(in_pages, projection, query_BHQD, scaling, mask)


def _decode_gathered(
    pages: Pages,
    projection: LayerProjection,
    step: Step,
    query_BHQD: Tensor,
    end_B: Tensor,
    first: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`_decode_compiled` by torch alone, on a copy of the pages."""
    needed = -(-step.longest // pages.tokens)
    rows = pages.read(step.pages_BX[step.ones, :needed])
    place_L = torch.arange(rows[0].shape[2], device=end_B.device)
    mask = _hide(rows, (place_L >= first) & (place_L < end_B[:, None]))
    return attend_part_of(Latents(projection, rows), query_BHQD, mask, scaling=scaling)


def _hide(rows: list[Tensor], is_seen_BL: Tensor) -> Tensor | None:
    """A mask of the tokens that are not seen, whose rows may be of others, and no numbers."""
    if bool(is_seen_BL.all()):
        return None
    for one in rows:
        one.masked_fill_(~is_seen_BL[:, None, :, None], 0)
    return is_seen_BL[:, None, None]
