"""Attention of one step of a server, whose sequences are in pages.

Shapes: B sequence, X page of a sequence, R range of tokens, T token of the step, L token of a
sequence, G KV head, H query head, Q = 1, D head dim, F = 2 D, [key | value].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from matkv.attention.kernels import native
from matkv.attention.latent import attend, attend_part_of
from matkv.attention.parts import merge
from matkv.latents import compiled
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection, joined
from matkv.latents.native import Paged
from matkv.vllm.exact import ExactRows
from matkv.vllm.pages import Pages


@dataclass(frozen=True)
class Span:
    """A sequence with several new tokens: its place in the batch, the new tokens, and all."""

    sequence: int
    tokens: slice
    length: int


@dataclass(frozen=True)
class Ones:
    """The sequences with one new token, which are computed at once.

    `tokens_B` are the places of these tokens among the step's, None where they are all of them, and
    `longest` is the most tokens that one of the sequences has. What is read is the same in all
    layers, and made once.
    """

    tokens_B: Tensor | None
    pages_BX: Tensor
    lengths_B: Tensor
    longest: int
    made: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def far(self, paged: Paged, sink: int, reach: int) -> native.Reads:
        """All tokens but the exact ones: after the first `sink`, before the last `reach`."""
        key = "far", sink, reach
        if key not in self.made:
            last_B = self.lengths_B - reach
            self.made[key] = torch.stack((torch.full_like(last_B, sink), last_B), dim=1)[:, None]
        return native.Reads(paged, self.pages_BX, self.made[key])

    def near(self, paged: Paged, sink: int, reach: int) -> native.Reads:
        """The exact tokens: the first `sink` and the last `reach`."""
        key = "near", sink, reach
        if key not in self.made:
            last_B, none_B = self.lengths_B, torch.zeros_like(self.lengths_B)
            recent_B = (last_B - reach).clamp_min(sink)
            ranges_BR = torch.stack((none_B, last_B.clamp_max(sink), recent_B, last_B), dim=1)
            self.made[key] = ranges_BR.unflatten(1, (2, 2))
        return native.Reads(paged, self.pages_BX, self.made[key])


@dataclass(frozen=True)
class Step:
    """What is computed in one step: of every sequence its pages and its tokens, new ones counted.

    `ones` are the sequences with one new token, `spans` are the others.
    """

    pages_BX: Tensor
    slots_T: Tensor
    ones: Ones | None
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

        These are all of its tokens; of a sequence with but one new token they may be more. Pages
        and lengths are int32, slots int64.
        """
        counts = [after - before for before, after in pairwise(starts)]
        single = [index for index, count in enumerate(counts) if count == 1]
        ones = None
        if single:
            which: Tensor | slice = slice(None)
            tokens_B = None
            if len(single) < len(counts):
                which = torch.tensor(single, device=pages_BX.device)
                tokens_B = torch.tensor([starts[i] for i in single], device=pages_BX.device)
            longest = max(ends[i] for i in single)
            ones = Ones(tokens_B, pages_BX[which].contiguous(), lengths_B[which], longest)
        return cls(
            pages_BX=pages_BX,
            slots_T=slots_T,
            ones=ones,
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
    out_THD: Tensor,
    *,
    scaling: float,
    near: Near | None = None,
) -> None:
    """Put the new tokens into their pages, and let them read all up to themselves, into `out`."""
    states_TGF = joined(key_TGD, value_TGD)
    pages.put(projection, states_TGF, step.slots_T)
    if near is not None:
        near.rows.write(states_TGF, near.step.slots_T)
    if step.ones is not None:
        _decode(pages, projection, step.ones, query_THD, out_THD, scaling, near)
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


def _decode(
    pages: Pages,
    projection: LayerProjection,
    ones: Ones,
    query_THD: Tensor,
    out_THD: Tensor,
    scaling: float,
    near: Near | None,
) -> None:
    """The sequences with one new token, all at once."""
    sink, reach = (0, 0) if near is None else (near.rows.sink, near.rows.reach)
    far, exact = ones.far(pages.paged, sink, reach), None
    if near is not None:
        assert near.step.ones is not None
        exact = near.step.ones.near(near.rows.paged, sink, reach)
    if _has_kernel(query_THD):
        native.attend_paged(
            query_THD, out_THD, projection, far, exact, tokens_B=ones.tokens_B, scaling=scaling
        )
        return
    if query_THD.device.type == "cuda":
        # triton comes with torch where there is CUDA
        from matkv.attention.kernels import gpu_paged

        gpu_paged.attend_paged(
            query_THD, out_THD, projection, far, exact, tokens_B=ones.tokens_B,
            longest=ones.longest, scaling=scaling,
        )  # fmt: skip
        return
    which = slice(None) if ones.tokens_B is None else ones.tokens_B
    query_BHQD = query_THD[which][:, :, None]
    out_BHQD, lse_BHQ = _decode_gathered(pages, projection, far, ones.longest, query_BHQD, scaling)
    if near is not None and exact is not None:
        out_BHQD = merge(out_BHQD, lse_BHQ, *near.rows.near(query_BHQD, exact, scaling))
    out_THD[which] = out_BHQD[:, :, 0]


def _has_kernel(query: Tensor) -> bool:
    """Whether the compiled kernel reads pages here; without it they are gathered."""
    return query.device.type == "cpu" and compiled.kernel() is not None


def _decode_gathered(
    pages: Pages,
    projection: LayerProjection,
    reads: native.Reads,
    longest: int,
    query_BHQD: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention by torch alone on a copy of the pages, up to the `longest`.  [BHQD, BHQ]"""
    rows = pages.read(reads.table_BX[:, : -(-longest // pages.tokens)])
    place_L = torch.arange(rows[0].shape[2], device=query_BHQD.device)
    first_B1, last_B1 = reads.ranges_BR2[:, 0, :1], reads.ranges_BR2[:, 0, 1:]
    mask = _hide(rows, (place_L >= first_B1) & (place_L < last_B1))
    return attend_part_of(Latents(projection, rows), query_BHQD, mask, scaling=scaling)


def _hide(rows: list[Tensor], is_seen_BL: Tensor) -> Tensor | None:
    """A mask of the tokens that are not seen, whose rows may be of others, and no numbers."""
    if bool(is_seen_BL.all()):
        return None
    for one in rows:
        one.masked_fill_(~is_seen_BL[:, None, :, None], 0)
    return is_seen_BL[:, None, None]
