"""Attention computed on latents: keys and values are never rebuilt at full width.

    score = (q decode_key[:, :r]) · z_key · scaling
    out   = (softmax(score) · z_value) decode_value[:, :r]^T

`attend` takes the fast path, torch's fused attention on overlapping views of the rows, unless some
tokens are kept exact. `attend_explicit` forms the scores, serves exact tokens and is the oracle of
the fast path's tests.

Shapes: B batch, H query head, G KV head, N heads of one bucket, J query heads of a KV head
(H = G J), Q query position, X = J Q, T cached token, S sink token, W recent token, D head dim,
M = max(R_key, R_value), C row columns, E columns that a row drops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from matkv.errors import UnsupportedModelError
from matkv.latents import Bucket, LayerProjection

# Explicit scores of one block of queries stay under this many elements (128 MiB in fp32).
MAX_SCORES = 1 << 25


@dataclass
class Exact:
    """The dropped coordinates of tokens kept exact, for one bucket.

    `sink_BNSE` belongs to the positions start_B + s, `recent_BNWE` to the last W positions.
    """

    sink_BNSE: Tensor
    recent_BNWE: Tensor


@dataclass
class Latents:
    """What the cache hands to the attention function in place of full keys and values.

    `rows` holds a tensor [B N T C] per bucket of `projection`. When tokens are kept exact, `exact`
    holds their dropped coordinates per bucket and `start_B` the first real position of each
    sequence, counted with left padding.
    """

    projection: LayerProjection
    rows: list[Tensor]
    exact: list[Exact] | None = None
    start_B: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.rows[0].shape[2]


def attend(
    latents: Latents,
    query_BHQD: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention output of every query head.  [BHQD -> BHQD]

    `mask` [B|1, 1, Q, T] is boolean (True attends) or additive; None means causal, with the last
    query at the last token.

    Raises:
        UnsupportedModelError: the mask differs between heads, as a position bias does.
    """
    _check_mask(mask, query_BHQD.shape[2], latents.tokens)
    if latents.exact is not None:
        return attend_explicit(latents, query_BHQD, mask, scaling=scaling, dropout=dropout)
    parts = [
        _attend_fused(bucket, query_BNJQD, rows_BNTC, mask, scaling, dropout)
        for bucket, query_BNJQD, rows_BNTC in _per_bucket(latents, query_BHQD)
    ]
    return latents.projection.join(parts).flatten(1, 2)


def attend_explicit(
    latents: Latents,
    query_BHQD: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """`attend` with scores formed in fp32, in blocks of queries; serves exact tokens too."""
    B, H, Q, _ = query_BHQD.shape
    tokens = latents.tokens
    block = max(1, MAX_SCORES // (B * H * tokens))
    outs = []
    for first in range(0, Q, block):
        queries = slice(first, min(first + block, Q))
        bias = _bias(mask, queries, Q, tokens, query_BHQD)
        position_Q = torch.arange(tokens - Q, tokens, device=query_BHQD.device)[queries]
        parts = [
            _attend_block(latents, index, query_BNJQD, bias, position_Q, scaling, dropout)
            for index, (_, query_BNJQD, _) in enumerate(
                _per_bucket(latents, query_BHQD[:, :, queries])
            )
        ]
        outs.append(latents.projection.join(parts).flatten(1, 2))
    return torch.cat(outs, dim=2)


def _per_bucket(latents: Latents, query_BHQD: Tensor) -> list[tuple[Bucket, Tensor, Tensor]]:
    projection = latents.projection
    query_BGJQD = query_BHQD.unflatten(1, (projection.kv_heads, -1))
    return list(
        zip(projection.bucket_list, projection.split(query_BGJQD), latents.rows, strict=True)
    )


def _attend_fused(
    bucket: Bucket,
    query_BNJQD: Tensor,
    rows_BNTC: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """One bucket through torch's fused attention.  [-> BNJQD]"""
    B, N, J, Q, _ = query_BNJQD.shape
    tokens = rows_BNTC.shape[2]
    if bucket.value_rank == 0:
        return torch.zeros_like(query_BNJQD)
    key_BNTM = rows_BNTC[..., : bucket.width]
    value_BNTM = rows_BNTC[..., -bucket.width :]
    query_BNXM = query_BNJQD.flatten(2, 3) @ bucket.query
    causal = mask is None and Q == tokens and Q > 1
    if mask is None and not causal and Q > 1:
        mask = _causal_mask(Q, tokens, query_BNXM.device)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query_BNXM.dtype)
    attend_fused = partial(
        F.scaled_dot_product_attention,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
    )
    # A group's query heads become query positions of their KV head, so that decoding reads the
    # cache once; with more queries, one call per query head copies neither keys, values nor mask.
    queries = [query_BNXM] if Q == 1 else query_BNXM.split(Q, dim=2)
    out_BNXM = torch.cat([attend_fused(q, key_BNTM, value_BNTM) for q in queries], dim=2)
    out_BNJQD: Tensor = (out_BNXM @ bucket.output).unflatten(2, (J, Q))
    return out_BNJQD


def _attend_block(
    latents: Latents,
    index: int,
    query_BNJQD: Tensor,
    bias: Tensor,
    position_Q: Tensor,
    scaling: float,
    dropout: float,
) -> Tensor:
    """One bucket and one block of queries with explicit scores.  [-> BNJQD]"""
    bucket, rows_BNTC = latents.projection.bucket_list[index], latents.rows[index]
    J, Q = query_BNJQD.shape[2:4]
    query_BNXD = query_BNJQD.flatten(2, 3)
    key_BNTR, value_BNTR = rows_BNTC.split([bucket.key_rank, bucket.value_rank], dim=-1)
    query_BNXR = query_BNXD @ bucket.query[..., : bucket.key_rank]
    scores_BNJQT = (query_BNXR @ key_BNTR.mT).float().unflatten(2, (J, Q))
    exact = latents.exact[index] if latents.exact is not None else None
    spans = _exact_spans(latents, exact, position_Q) if exact is not None else []
    for index_BT, gate_BQT, rest_BNTE in spans:
        query_rest_BNXE = query_BNXD @ bucket.query_rest
        more = (query_rest_BNXE @ rest_BNTE[..., : query_rest_BNXE.shape[-1]].mT).float()
        more = more.unflatten(2, (J, Q)) * gate_BQT[:, None, None]
        scores_BNJQT.scatter_add_(-1, index_BT[:, None, None, None].expand_as(more), more)
    weights_BNJQT = torch.softmax(scores_BNJQT * scaling + bias, dim=-1)
    weights_BNJQT = F.dropout(weights_BNJQT, dropout).to(rows_BNTC.dtype)
    lift_BNRD = bucket.output[:, bucket.width - bucket.value_rank :]
    out_BNXD = weights_BNJQT.flatten(2, 3) @ value_BNTR @ lift_BNRD
    for index_BT, gate_BQT, rest_BNTE in spans:
        picks = index_BT[:, None, None, None].expand(*weights_BNJQT.shape[:4], -1)
        part = (weights_BNJQT.gather(-1, picks) * gate_BQT[:, None, None]).flatten(2, 3)
        rest_value_BNTE = rest_BNTE[..., bucket.query_rest.shape[-1] :]
        out_BNXD = out_BNXD + part @ rest_value_BNTE @ bucket.output_rest
    out_BNJQD: Tensor = out_BNXD.unflatten(2, (J, Q))
    return out_BNJQD


def _exact_spans(
    latents: Latents, exact: Exact, position_Q: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(token index [B T'], which query may use it [B Q T'], dropped coordinates [B N T' E])."""
    assert latents.start_B is not None
    device = position_Q.device
    reach = latents.projection.window or -1  # -1: not even a query's own token is near
    B = exact.recent_BNWE.shape[0]
    recents = exact.recent_BNWE.shape[2]
    recent_BW = torch.arange(latents.tokens - recents, latents.tokens, device=device).expand(B, -1)
    sink_BS = latents.start_B[:, None] + torch.arange(exact.sink_BNSE.shape[2], device=device)
    spans = []
    for index_BT, rest, is_sink in (
        (sink_BS, exact.sink_BNSE, True),
        (recent_BW, exact.recent_BNWE, False),
    ):
        near_BQT = position_Q[None, :, None] - index_BT[:, None] <= reach
        inside_BQT = (index_BT < latents.tokens)[:, None] & (near_BQT != is_sink)
        gate = inside_BQT.to(rest.dtype)
        spans.append((index_BT.clamp_max(latents.tokens - 1), gate, rest))
    return [span for span in spans if span[0].shape[1]]


def _causal_mask(Q: int, tokens: int, device: torch.device) -> Tensor:
    """Boolean [Q T]: the last query sees every token."""
    return torch.ones(Q, tokens, dtype=torch.bool, device=device).tril(tokens - Q)


def _bias(mask: Tensor | None, queries: slice, Q: int, tokens: int, like: Tensor) -> Tensor:
    """Additive fp32 mask of a block of queries, broadcastable to [B N J Q T].

    The lowest finite number stands for minus infinity: a fully masked row stays finite.
    """
    if mask is None:
        mask = _causal_mask(Q, tokens, like.device)[None, None]
    mask = mask[:, :, queries]
    lowest = torch.finfo(torch.float32).min
    if mask.dtype == torch.bool:
        zero = torch.zeros((), device=like.device)
        return torch.where(mask, zero, lowest)[:, :, None]
    return mask.float().clamp_min(lowest)[:, :, None]


def _check_mask(mask: Tensor | None, Q: int, tokens: int) -> None:
    if mask is None:
        return
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (Q, tokens):
        raise UnsupportedModelError(
            f"attention mask of shape {tuple(mask.shape)}; latent attention takes "
            f"[batch, 1, {Q}, {tokens}], one mask for all heads"
        )
