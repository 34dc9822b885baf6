"""Eviction of whole tokens at a budget that holds all along, written from its papers.

A cache of budget b holds, after t tokens, max(8, b t) of them in every KV head, all exact. Which:

    StreamingLLM (arXiv 2309.17453)    the first 4 and the last ones
    H2O (arXiv 2306.14048)             half the last ones, half those that all queries so far have
                                       given the most attention
    SnapKV (arXiv 2404.14469)          the last 32, and those that the last 32 queries have given
                                       the most, pooled over 7 neighbours

The context is read with the full cache, and tokens are dropped right after, as in SnapKV; then
after every chunk again. SnapKV itself drops nothing of what is generated: here it goes on, as H2O
and StreamingLLM do, for the bytes of its cache would leave any budget otherwise. StreamingLLM's
tokens keep the positions at which they were read. Dropping is real: `held` are resident bytes.

Shapes: B batch, H query head, G KV head, Q query, T held token, D head dim, J query head of a KV
head, K token that stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from matkv.errors import UnsupportedModelError
from matkv.hf.function import Call, handled
from matkv.hf.geometry import attention_modules, geometry_of

from .protocol import Method

Rule = Literal["StreamingLLM", "H2O", "SnapKV"]
RULES: tuple[Rule, ...] = ("StreamingLLM", "H2O", "SnapKV")
SINK = 4
OBSERVED = 32  # queries whose attention SnapKV goes by
POOLED = 7
HOLDER = "evicting_layer"  # the attribute by which keys on their way say whose they are
LEAST = 8  # tokens that no budget drops
BLOCK = 256  # queries whose weights are spread out at once


class EvictingLayer(DynamicLayer):
    """One layer's tokens that were not dropped, and what attention each of them was given."""

    keys: Any
    values: Any

    def __init__(self, rule: Rule, budget: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rule, self.budget = rule, budget
        self.seen = 0
        self.given_BGT: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[2]
        setattr(key, HOLDER, self)
        return key, value

    def drop(self, query_BHQD: Tensor, scaling: float) -> None:
        """Drop what the budget does not hold, after the last tokens' queries have attended."""
        self._note(query_BHQD, scaling)
        length, room = self.keys.shape[2], max(LEAST, int(self.budget * self.seen + 1e-9))
        if length <= room:
            return
        keep_BGK = self._worth(length, room).topk(room, dim=-1).indices.sort(dim=-1).values
        index_BGKD = keep_BGK[..., None].expand(*keep_BGK.shape, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, index_BGKD), self.values.gather(2, index_BGKD)
        if self.given_BGT is not None:
            self.given_BGT = self.given_BGT.gather(2, keep_BGK)

    def _worth(self, length: int, room: int) -> Tensor:
        """What every token is worth, those that stay in any case infinitely much.  [BGT]"""
        place_T = torch.arange(length, device=self.keys.device)
        if self.rule == "StreamingLLM":
            worth_T = place_T.float().masked_fill(place_T < min(SINK, room // 2), math.inf)
            return worth_T.expand(*self.keys.shape[:2], -1)
        assert self.given_BGT is not None
        recent = room // 2 if self.rule == "H2O" else min(OBSERVED, room // 2)
        worth_BGT = self.given_BGT
        if self.rule == "SnapKV":
            worth_BGT = F.avg_pool1d(worth_BGT, POOLED, 1, POOLED // 2, count_include_pad=False)
        return worth_BGT.masked_fill(place_T >= length - recent, math.inf)

    def _note(self, query_BHQD: Tensor, scaling: float) -> None:
        """Add the attention that new queries have given; SnapKV forgets that of older ones."""
        if self.rule == "StreamingLLM":
            return
        length, new = self.keys.shape[2], query_BHQD.shape[2]
        if self.rule == "SnapKV":
            query_BHQD = query_BHQD[:, :, -OBSERVED:]
        total_BGT = torch.zeros(self.keys.shape[:3], device=self.keys.device)
        first = length - query_BHQD.shape[2]
        for part_BHQD in query_BHQD.split(BLOCK, dim=2):
            total_BGT += attention_given(part_BHQD, self.keys, first, scaling)
            first += part_BHQD.shape[2]
        if self.given_BGT is not None:
            share = max(0.0, 1 - new / OBSERVED) if self.rule == "SnapKV" else 1.0
            total_BGT[..., : self.given_BGT.shape[2]] += share * self.given_BGT
        self.given_BGT = total_BGT


def attention_given(query_BHQD: Tensor, key_BGTD: Tensor, first: int, scaling: float) -> Tensor:
    """What the queries of the tokens from `first` on give every token, summed.  [BGT]"""
    query_BGJQD = query_BHQD.float().unflatten(1, (key_BGTD.shape[1], -1))
    scores_BGJQT = query_BGJQD @ key_BGTD.float()[:, :, None].mT * scaling
    place_T = torch.arange(key_BGTD.shape[2], device=key_BGTD.device)
    own_Q1 = torch.arange(first, first + query_BHQD.shape[2], device=key_BGTD.device)[:, None]
    given_BGT: Tensor
    given_BGT = scores_BGJQT.masked_fill(place_T > own_Q1, -math.inf).softmax(-1).sum((2, 3))
    return given_BGT


class Dropping:
    """Attends as usual, then has the layer whose keys these are drop tokens."""

    def attend(self, call: Call) -> Tensor:
        """[-> BQHD]"""
        key_BGTD, value_BGTD = call.states
        out_BQHD = call.usual(key_BGTD, value_BGTD)
        scaling = key_BGTD.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        layer: EvictingLayer = getattr(key_BGTD, HOLDER)
        layer.drop(call.query_BHQD, scaling)
        return out_BQHD


class Evicting(Method):
    """A cache that drops tokens by one of the rules."""

    def __init__(self, rule: Rule, budget: float) -> None:
        self.rule, self.budget = rule, budget

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        layers = range(len(attention_modules(model)))
        with handled(model, {layer: Dropping() for layer in layers}):
            yield model

    def new_cache(self, model: Any) -> Any:
        cache = DynamicCache(config=model.config)
        if not all(shape.window is None for shape in geometry_of(model.config).layers):
            raise UnsupportedModelError("eviction is written for layers without sliding windows")
        cache.layers = [EvictingLayer(self.rule, self.budget) for _ in cache.layers]
        return cache
