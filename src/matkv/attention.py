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

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from matkv.errors import CacheError, UnsupportedModelError
from matkv.kernels import cpu
from matkv.latents import LayerProjection, per_head

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
    sequence, counted with left padding. `is_static`: the rows have room for later tokens, which a
    mask hides; only the prompt of an empty cache comes without one.
    """

    projection: LayerProjection
    rows: list[Tensor]
    exact: list[Exact] | None = None
    start_B: Tensor | None = None
    is_static: bool = False

    @property
    def tokens(self) -> int:
        return self.rows[0].shape[2]

    def __getattr__(self, name: str) -> NoReturn:
        """Another attention function, of a model no longer attached, takes this for a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise CacheError("the cache holds latents, but the model is not attached: use a new cache")


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
    queries = query_BHQD.shape[2]
    if latents.is_static and mask is None:
        latents = Latents(latents.projection, [rows[:, :, :queries] for rows in latents.rows])
    _check_mask(mask, queries, latents.tokens)
    if latents.exact is not None:
        return attend_explicit(latents, query_BHQD, mask, scaling=scaling, dropout=dropout)
    projection, rows = latents.projection, latents.rows
    query_BGXM = per_head(projection.enter(query_BHQD), projection.query)
    decode = _decoder(query_BGXM, rows) if queries == 1 and not dropout else None
    if decode is not None:
        out_BGXM = decode(query_BGXM, rows, projection, _additive(mask, query_BGXM.dtype), scaling)
    else:
        out_BGXM = _attend_fused(latents, query_BGXM, queries, mask, scaling, dropout)
    return projection.leave(per_head(out_BGXM, projection.output), queries)


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
    projection, tokens = latents.projection, latents.tokens
    block = max(1, MAX_SCORES // (B * H * tokens))
    outs = []
    for first in range(0, Q, block):
        queries = slice(first, min(first + block, Q))
        bias = _bias(mask, queries, Q, tokens, query_BHQD)
        position_Q = torch.arange(tokens - Q, tokens, device=query_BHQD.device)[queries]
        query_BGXD = projection.enter(query_BHQD[:, :, queries])
        parts = [
            _attend_block(latents, index, query_BGXD, bias, position_Q, scaling, dropout)
            for index in range(len(projection.buckets))
        ]
        outs.append(projection.leave(torch.cat(parts, dim=1), queries.stop - first))
    return torch.cat(outs, dim=2)


Decode = Callable[[Tensor, list[Tensor], LayerProjection, Tensor | None, float], Tensor]


def _decoder(query_BGXM: Tensor, rows: list[Tensor]) -> Decode | None:
    """The device's fast path for one query position; none where gradients flow."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query_BGXM, *rows)):
        return None
    if query_BGXM.device.type == "cuda":
        from matkv.kernels import gpu  # triton comes with torch where there is CUDA

        return gpu.decode
    return cpu.decode if query_BGXM.device.type == "cpu" else None


def _attend_fused(
    latents: Latents,
    query_BGXM: Tensor,
    queries: int,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Every bucket through torch's fused attention.  [-> BGXM]"""
    M, tokens = query_BGXM.shape[3], latents.tokens
    causal = mask is None and queries == tokens and queries > 1
    if mask is None and not causal and queries > 1:
        mask = _causal_mask(queries, tokens, query_BGXM.device)
    mask = _additive(mask, query_BGXM.dtype)
    attend_fused = partial(
        F.scaled_dot_product_attention,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
    )
    # One call per query head of a group copies neither keys, values nor mask; with one query
    # position the heads are positions of one call.
    step = queries if queries > 1 else query_BGXM.shape[2]
    out_BGXM = query_BGXM.new_zeros(query_BGXM.shape)
    for bucket, rows_BNTC in zip(latents.projection.buckets, latents.rows, strict=True):
        if bucket.row_width == 0:
            continue
        width = bucket.width
        key_BNTM, value_BNTM = rows_BNTC[..., :width], rows_BNTC[..., -width:]
        query_BNXM = query_BGXM[:, bucket.heads, :, :width]
        parts = [attend_fused(part, key_BNTM, value_BNTM) for part in query_BNXM.split(step, dim=2)]
        out_BGXM[:, bucket.heads, :, M - width :] = torch.cat(parts, dim=2)
    return out_BGXM


def _attend_block(
    latents: Latents,
    index: int,
    query_BGXD: Tensor,
    bias: Tensor,
    position_Q: Tensor,
    scaling: float,
    dropout: float,
) -> Tensor:
    """One bucket and one block of queries with explicit scores.  [-> BNXD]"""
    projection, rows_BNTC = latents.projection, latents.rows[index]
    heads, row_width = projection.buckets[index].heads, projection.buckets[index].row_width
    width, Q = min(row_width, projection.width), position_Q.shape[0]
    query_BNXD = query_BGXD[:, heads]
    query_BNXM = query_BNXD @ projection.query[heads, :, :width]
    scores_BNJQT = (query_BNXM @ rows_BNTC[..., :width].mT).float().unflatten(2, (-1, Q))
    exact = latents.exact[index] if latents.exact is not None else None
    spans = _exact_spans(latents, exact, position_Q) if exact is not None else []
    dropped = slice(0, 2 * projection.head_dim - row_width)
    for index_BT, gate_BQT, rest_BNTE in spans:
        query_BNXE = query_BNXD @ projection.query_rest[heads, :, dropped]
        more = (query_BNXE @ rest_BNTE.mT).float().unflatten(2, (-1, Q))
        more = more * gate_BQT[:, None, None]
        scores_BNJQT.scatter_add_(-1, index_BT[:, None, None, None].expand_as(more), more)
    weights_BNJQT = torch.softmax(scores_BNJQT * scaling + bias, dim=-1)
    weights_BNJQT = F.dropout(weights_BNJQT, dropout).to(rows_BNTC.dtype)
    value_BNTM = rows_BNTC[..., row_width - width :]
    lift_NMD = projection.output[heads, projection.width - width :]
    out_BNXD = weights_BNJQT.flatten(2, 3) @ value_BNTM @ lift_NMD
    for index_BT, gate_BQT, rest_BNTE in spans:
        picks = index_BT[:, None, None, None].expand(*weights_BNJQT.shape[:4], -1)
        part = (weights_BNJQT.gather(-1, picks) * gate_BQT[:, None, None]).flatten(2, 3)
        out_BNXD = out_BNXD + part @ rest_BNTE @ projection.output_rest[heads, dropped]
    return out_BNXD


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


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers to add to scores: one conversion for all calls of a layer."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(dtype)
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


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
