"""Random operations on a cache, and what the model says of the same tokens without any cache.

Every operation is done to the cache and to a plain record of its tokens. What the model predicts
through the cache must then be what it predicts of each sequence alone, read anew from its first
token on, without padding: no operation before may show.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import matkv
from matkv.cache.cache import StaticLatentCache, attached_projections
from matkv.cache.layer import LatentLayer
from matkv.errors import CacheError
from matkv.hf.shrink import shrink
from tiny import Tiny, tokens

ROOM = 120  # of a static cache, and more than any sequence here grows to
WIDEST = 6  # sequences


@dataclass
class Record:
    """The tokens of a cache: `ids_BT`, and which of them are `real_BT`."""

    ids_BT: Tensor
    real_BT: Tensor

    @property
    def length(self) -> int:
        return self.ids_BT.shape[1]

    def select(self, index_B: Tensor) -> None:
        self.ids_BT, self.real_BT = self.ids_BT[index_B], self.real_BT[index_B]

    def crop(self, length: int) -> None:
        self.ids_BT, self.real_BT = self.ids_BT[:, :length], self.real_BT[:, :length]


@dataclass
class Operated:
    """A model, one of its caches, and the record of that.

    `takes_holes`: padding may lie among tokens. `log` tells what was done, for whoever looks for a
    fault.
    """

    subject: Tiny
    cache: Any
    rng: random.Random
    takes_holes: bool
    tolerance: Callable[[Tensor], bool]
    record: Record = field(init=False)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        batch = self.rng.randint(1, 3)
        empty = torch.zeros(batch, 0, dtype=torch.long)
        self.record = Record(empty, empty.bool())

    @property
    def is_static(self) -> bool:
        return isinstance(self.cache, StaticLatentCache)

    # ---- operations

    def feed(self, count: int | None = None) -> None:
        """Read tokens through the cache, and compare what is predicted after each."""
        most = min(30, ROOM - self.record.length)
        count = count or self.rng.choice([1, 1, 1, 2, 3, 7, 12, 30])
        if most < 1:
            return
        count = min(count, most)
        B = self.record.ids_BT.shape[0]
        ids_BQ = tokens(B, count, seed=self.rng.randrange(10**6))
        real_BQ = self._padding(B, count)
        self.log.append(f"feed {B} × {count}, {int((~real_BQ).sum())} of them padding")
        record = self.record
        record.ids_BT = torch.cat((record.ids_BT, ids_BQ), dim=1)
        record.real_BT = torch.cat((record.real_BT, real_BQ), dim=1)
        found_BQV = self._predicted(ids_BQ)
        for row in range(B):
            expected_TV = self._alone(row)
            there_Q = real_BQ[row]
            if not there_Q.any():
                continue
            expected_QV = expected_TV[-int(there_Q.sum()) :]
            off_QV = (found_BQV[row, there_Q] - expected_QV).abs()
            assert self.tolerance(off_QV), f"off by {float(off_QV.max()):.2e}: " + self.story

    def _padding(self, B: int, count: int) -> Tensor:
        """Left padding of sequences that have no token yet, and holes where they may be."""
        real_BQ = torch.ones(B, count, dtype=torch.bool)
        for row in range(B):
            if self.record.real_BT[row].any():
                if self.takes_holes and self.rng.random() < 0.15:
                    real_BQ[row, self.rng.randrange(count) :] = False
            elif self.rng.random() < 0.5:
                real_BQ[row, : self.rng.randint(0, count if self.record.length < 20 else 0)] = False
        if not self.takes_holes and not (self.record.real_BT.any(1) | real_BQ.any(1)).all():
            return torch.ones(B, count, dtype=torch.bool) if self.record.length else real_BQ
        return real_BQ

    @torch.no_grad()
    def _predicted(self, ids_BQ: Tensor) -> Tensor:
        mask_BT = self.record.real_BT.long()
        named: dict[str, Any] = {"past_key_values": self.cache}
        if not self.record.real_BT.all() or self.rng.random() < 0.5:
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
            named["attention_mask"] = mask_BT
            named["position_ids"] = positions_BT[:, -ids_BQ.shape[1] :]
        logits_BQV: Tensor = self.subject.model(ids_BQ, **named).logits
        return logits_BQV

    @torch.no_grad()
    def _alone(self, row: int) -> Tensor:
        ids_T = self.record.ids_BT[row, self.record.real_BT[row]]
        if not len(ids_T):
            return torch.zeros(0, 0)
        logits_TV: Tensor = self.subject.model(ids_T[None], use_cache=False).logits[0]
        return logits_TV

    def crop(self) -> None:
        """Take back some tokens; where that is refused, nothing has changed."""
        removed = self.rng.choice([0, 1, 2, 5, 11, 200])
        self.log.append(f"crop {removed}")
        try:
            self.cache.crop(-removed)
        except CacheError:
            self.log[-1] += ", refused"
            return
        self.record.crop(max(0, self.record.length - removed))

    def try_and_take_back(self) -> None:
        """What speculative decoding does."""
        if self.is_static:
            return
        self.log.append("record the past")
        self.cache.activate_past_recording()
        before = self.record.length
        self.feed()
        kept = self.rng.randint(0, self.record.length - before)
        removed = self.record.length - before - kept
        self.log.append(f"crop {removed} of these")
        self.cache.crop(-removed)
        self.record.crop(before + kept)

    def reorder(self) -> None:
        B = self.record.ids_BT.shape[0]
        index_B = torch.tensor([self.rng.randrange(B) for _ in range(B)])
        self.log.append(f"reorder {index_B.tolist()}")
        if self.record.length or not self.is_static:
            self.cache.reorder_cache(index_B)
            self.record.select(index_B)

    def repeat(self) -> None:
        B, times = self.record.ids_BT.shape[0], self.rng.randint(1, 3)
        if self.is_static or B * times > WIDEST:
            return
        self.log.append(f"repeat {times} times")
        self.cache.batch_repeat_interleave(times)
        self.record.select(torch.arange(B).repeat_interleave(times))

    def pick(self) -> None:
        B = self.record.ids_BT.shape[0]
        if self.is_static:
            return
        index = sorted(self.rng.sample(range(B), self.rng.randint(1, B)))
        self.log.append(f"pick {index}")
        self.cache.batch_select_indices(torch.tensor(index))
        self.record.select(torch.tensor(index))

    def fork(self) -> None:
        """Go on with a copy; the one it was made of must not notice."""
        self.log.append("fork")
        before, record = self.cache, copy.copy(self.record)
        self.cache = copy.deepcopy(before)
        self.feed()
        if self.rng.random() < 0.5:
            self.log.append("back to the one before")
            self.cache, self.record = before, record
            self.feed()

    def leave_and_come_back(self) -> None:
        if self.is_static:
            return
        self.log.append("offload and prefetch")
        for layer in self.cache.layers:
            layer.offload()
        for layer in self.cache.layers:
            layer.prefetch()

    def reset(self) -> None:
        if self.is_static:  # its batch stays
            self.log.append("reset")
            self.cache.reset()
            self.record.crop(0)
        elif self.rng.random() < 0.3:
            self.log.append("reset")
            self.cache.reset()
            batch = self.rng.randint(1, 3)
            empty = torch.zeros(batch, 0, dtype=torch.long)
            self.record = Record(empty, empty.bool())

    @torch.no_grad()
    def shrink(self, end: float) -> None:
        """At the end: what is held and what is read anew go on at a smaller budget alike."""
        self.log.append(f"shrink to {end}")
        model, twin = self.subject.model, matkv.LatentCache(self.subject.model)
        mask_BT = self.record.real_BT.long()
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
        named = {"attention_mask": mask_BT, "position_ids": positions_BT}
        self.cache.crop(0)  # gives back what was kept to be taken back
        model(self.record.ids_BT, past_key_values=twin, **named)
        shrink(model, self.cache, end)
        projections = attached_projections(model)
        for index, layer in enumerate(twin.layers):
            if isinstance(layer, LatentLayer):
                layer.narrow(projections[index])
        if self.record.real_BT.all():  # among padding more tokens are held than are exact
            assert self.cache.used_nbytes == twin.used_nbytes, self.story
        B = mask_BT.shape[0]
        ids_BQ = tokens(B, 3, seed=1)
        named["attention_mask"] = torch.cat((mask_BT, torch.ones_like(ids_BQ)), dim=1)
        named["position_ids"] = mask_BT.sum(-1, keepdim=True) + torch.arange(3)
        found, expected = (
            model(ids_BQ, past_key_values=cache, **named).logits for cache in (self.cache, twin)
        )
        assert self.tolerance((found - expected).abs()), "after shrinking: " + self.story

    # ---- running

    @property
    def story(self) -> str:
        return "; ".join(self.log)

    def run(self, count: int) -> None:
        """So many operations, more than every second of which reads tokens."""
        others = [
            self.crop, self.crop, self.try_and_take_back, self.try_and_take_back, self.reorder,
            self.repeat, self.pick, self.fork, self.leave_and_come_back, self.reset,
        ]  # fmt: skip
        self.feed()
        for _ in range(count):
            (self.feed if self.rng.random() < 0.5 else self.rng.choice(others))()
            held = int(self.cache.get_seq_length())
            assert held == self.record.length, f"{held} tokens: {self.story}"
        self.feed(3)


def operated(subject: Tiny, seed: int, tolerance: Callable[[Tensor], bool]) -> Operated:
    """A cache of any kind for an attached model, to be operated on by a seed."""
    rng = random.Random(seed)
    has_windows = any(shape.window is not None for shape in subject.geometry.layers)
    is_static = rng.random() < 0.3 and not subject.geometry.staying
    if is_static:
        rollback = rng.choice([0, 3, 16])
        cache: Any = StaticLatentCache(subject.model, ROOM, rollback=rollback)
    else:
        cache = matkv.LatentCache(subject.model, max_cache_len=rng.choice([None, ROOM]))
    takes_holes = not has_windows and not is_static
    made = Operated(subject, cache, rng, takes_holes, tolerance)
    made.log.append(f"seed {seed}, {type(cache).__name__}")
    return made
