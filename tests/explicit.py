"""Attention on latents as it is written in books: the oracle of the fast paths' tests.

Shapes: B batch, H query head, G KV head, N heads of one bucket, Q query, T token, L latent, D head
dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matkv.latents.latents import Latents


def attend_explicit(
    latents: Latents,
    query_BHQD: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """`attend` on keys and values rebuilt at full width, with a mask of which query reads which."""
    assert not dropout
    exact, queries = latents.exact, query_BHQD.shape[2]
    key_BGTD, value_BGTD = rebuilt(latents)
    sink = 0 if exact is None else exact.sink
    position_Q = torch.arange(latents.tokens - queries, latents.tokens)[:, None]
    place_BT = torch.arange(key_BGTD.shape[2])[None] + sink
    reads_BQT = (position_Q >= place_BT[:, None]) | (mask is not None)
    if exact is not None:
        sink_BS = torch.arange(sink)[None] if exact.sink_BS is None else exact.sink_BS
        count_BT = exact.count_BT
        count_BT = torch.arange(exact.tokens)[None] if count_BT is None else count_BT
        count_BT = count_BT.expand(len(sink_BS) if sink else len(count_BT), -1)
        recent_BK = torch.arange(exact.first, exact.tokens)[None]

        def after(place_BT: Tensor) -> Tensor:
            """Neither a sink nor padding before it.  [B 1 T]"""
            return (place_BT > sink_BS[:, -1:] if sink else place_BT >= 0)[:, None]

        def near(place_BT: Tensor) -> Tensor:
            """In the recent and no sink."""
            counts_BQT = count_BT[:, position_Q] - count_BT[:, None, place_BT[0]]
            is_seen_BQT = (position_Q >= place_BT[:, None]) | (mask is not None)
            is_near_BQT = (counts_BQT < exact.reach) & (exact.reach > 0)
            return is_seen_BQT & is_near_BQT & after(place_BT)

        reads_BQT = reads_BQT | (mask is not None)
        sinks_BQS = (sink_BS[:, None] <= position_Q) | (mask is not None)
        reads = [reads_BQT & after(place_BT) & ~near(place_BT)]
        reads += [sinks_BQS & (sink_BS[:, None] < exact.tokens), near(recent_BK)]
        places = [place_BT, sink_BS, recent_BK]
        batch = max(len(part) for part in reads)
        reads_BQT = torch.cat([part.expand(batch, -1, -1) for part in reads], dim=2)
        place_BT = torch.cat([part.expand(batch, -1) for part in places], dim=1)
        states = torch.cat((exact.sink_BGSF, exact.recent_BGKF), dim=2).float().chunk(2, dim=-1)
        key_BGTD = torch.cat((key_BGTD, states[0]), dim=2)
        value_BGTD = torch.cat((value_BGTD, states[1]), dim=2)
    bias_BQT = torch.where(reads_BQT, 0.0, torch.finfo(torch.float32).min)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        batch = max(len(mask), len(place_BT))
        index_BQT = place_BT.clamp_max(latents.tokens - 1)[:, None].expand(batch, queries, -1)
        bias_BQT = bias_BQT + mask.float()[:, 0].expand(batch, -1, -1).gather(2, index_BQT)
    bias_BQT = bias_BQT.clamp_min(torch.finfo(torch.float32).min)
    group = query_BHQD.shape[1] // key_BGTD.shape[1]
    scores_BHQT = query_BHQD.float() @ key_BGTD.repeat_interleave(group, 1).mT * scaling
    weights_BHQT = (scores_BHQT + bias_BQT[:, None]).softmax(-1)
    return (weights_BHQT @ value_BGTD.repeat_interleave(group, 1)).to(query_BHQD.dtype)


def rebuilt(latents: Latents) -> tuple[Tensor, Tensor]:
    """Keys and values of the latents at full width, in fp32.  [BGLD]"""
    projection, keys, values = latents.projection, [], []
    for bucket, rows_BNLC in zip(projection.buckets, projection.latents(latents.rows), strict=True):
        width, rows = bucket.width, rows_BNLC.float()
        enter_NDM = projection.query[bucket.heads, :, :width].float()
        leave_NMD = projection.output[bucket.heads, projection.width - width :].float()
        keys.append(rows[..., :width] @ enter_NDM.mT)
        values.append(rows[..., rows.shape[-1] - width :] @ leave_NMD)
    return projection.unsort(torch.cat(keys, 1)), projection.unsort(torch.cat(values, 1))
